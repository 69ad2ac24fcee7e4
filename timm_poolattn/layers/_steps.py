"""The passes that gates make over a map, each as a plain equation and with a backward pass of its own.

What autograd derives from the plain equations compares whole maps to find an extreme again, and adds up a whole map
for each use of x. In eager training each pooling step hands x on instead, so that its gradient is one map, which the
steps before it add to in place, and an extreme is found again in the fastest way that the device and the layout have.
Elsewhere the plain equations run, which are the reference in the tests: without gradients nothing would be gained, and
torch.compile fuses them itself, but for the comparing.

A batch norm before the gate, x = a z + d, need not be written out either: extremes and means of x are those of z, and
so is what scales it. `norm_affine` gives a and d, and the steps then take z.
"""

import torch
from torch import fx, nn
from torch.autograd import Function
from torch.nn import functional as F

#: Weights of a linear layer up to which a call of the matrix product costs more than multiplying and adding.
_SMALL = 2048


def runs_eagerly(x: torch.Tensor) -> bool:
    """Whether neither a graph is being captured nor torch.func at work."""
    if isinstance(x, fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not torch._C._are_functorch_transforms_active()  # what autograd.Function itself asks


def trains_eagerly(x: torch.Tensor) -> bool:
    """Whether it runs eagerly, and a gradient will be asked for."""
    return runs_eagerly(x) and torch.is_grad_enabled() and x.requires_grad


def compiles() -> bool:
    """Whether torch.compile is at work, and not torch.export."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def trains_compiled(x: torch.Tensor) -> bool:
    """Whether torch.compile is at work, and a gradient will be asked for."""
    if not compiles() or torch._C._are_functorch_transforms_active():
        return False
    return torch.is_grad_enabled() and x.requires_grad


def hooked(module: nn.Module) -> bool:
    """Whether a hook wants this module called, with its own input and output. torch's fast paths ask in this way."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(len(h) > 0 for h in hooks)


def folds_norm(norm: nn.Module, z: torch.Tensor) -> bool:
    """Whether `norm_affine` can stand for norm(z), and is faster: on CPU, and for what torch.compile trains."""
    if not trains_compiled(z) and not (runs_eagerly(z) and z.is_cpu and not torch.is_autocast_enabled('cpu')):
        return False
    if type(norm) is not nn.BatchNorm2d or hooked(norm):
        return False
    if not norm.affine or norm.running_mean is None or norm.momentum is None or z.dtype != norm.weight.dtype:
        return False
    return not norm.training or z.numel() > z.shape[1]  # the norm has an error for a single value


def norm_affine(norm: nn.BatchNorm2d, z: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """z (B, C, H, W) -> z, (a, d) (C) each, so that norm(z) = a z + d. Go on with the z that comes back."""
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        norm.num_batches_tracked.add_(1)
        z, mean, var = _BatchStats.apply(z, mean, var, norm.momentum)
    a = norm.weight * (var + norm.eps).rsqrt()
    return z, (a, torch.addcmul(norm.bias, mean, a, value=-1))


def max_min_pool(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (B, C, H, W) -> x, f_max, f_min (B, C): Eq. 1 of SPEM. Go on with the x that comes back."""
    if not torch.jit.is_scripting():
        if trains_eagerly(x):
            by_index = not x.is_cpu or x.stride(1) == 1
            return _MaxMinPool.apply(x)[:3] if by_index else _MaxMinCompare.apply(x)
        if trains_compiled(x):
            return x, *_MaxMinCompiled.apply(x)[:2]
    return x, x.amax((2, 3)), x.amin((2, 3))


def channel_mean(
    x: torch.Tensor, affine: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, C, H, W) -> x, its mean over channels (B, 1, H, W): Eq. 5 of SAAM. Go on with the x that comes back.

    With `affine` = (a, d), (C) each, the mean is that of a x + d.
    """
    if affine is None:
        if not torch.jit.is_scripting():  # noqa: SIM102
            if trains_eagerly(x):
                return _ChannelMean.apply(x)
        return x, x.mean(1, keepdim=True)
    a, d = affine[0] / x.shape[1], affine[1].mean()
    if not torch.jit.is_scripting():
        if trains_eagerly(x):
            x, mean = _ChannelSum.apply(x, a)
            return x, mean + d
        if compiles():
            return x, (x * a[:, None, None]).sum(1, keepdim=True) + d
    return x, _channel_sum(x, a) + d


def spatial_mean(x: torch.Tensor) -> torch.Tensor:
    """x (B, C, H, W) -> f, its mean over positions (B, C): Eq. 5 of FA."""
    if not torch.jit.is_scripting():  # noqa: SIM102
        if trains_eagerly(x):
            return _SpatialMean.apply(x)
    return x.mean((2, 3))


def fa_weight(x: torch.Tensor, u: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """X_{i+1} = X_i + (U_i - X_i) k_i, Eq. 9 of FA. Shapes: x and u (B, C, H, W), k (B, 1) -> (B, C, H, W)."""
    k = k.to(x.dtype)[:, :, None, None]
    if not torch.jit.is_scripting():
        if trains_eagerly(u):
            return _FAWeight.apply(x, u, k)
        if compiles():
            # lerp would read u three times, and a k for each sample would not share the loops of the pass before
            return x + (u - x) * k.expand(-1, x.shape[1], -1, -1)
    return torch.lerp(x, u, k)


def small_linear(fc: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """fc(x), x (B, C): under torch.compile as a sum, which fuses with what is around it, where a product is small."""
    if compiles() and fc.weight.numel() <= _SMALL:
        return (x[:, None] * fc.weight).sum(2) + fc.bias
    return fc(x)


def score_conv(mean: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """mean (B, 1, H, W), weight (K, 1, k, k) -> (B, K, H, W): Eq. 6 of SAAM."""
    if not torch.jit.is_scripting():
        if trains_eagerly(mean):
            return _ScoreConv.apply(mean, weight)
        if runs_eagerly(mean):
            return _conv_by_sample(mean, weight)
    return F.conv2d(mean, weight, padding=weight.shape[2] // 2)


def weighted_pool(x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (B, C, H, W), v (B, K, H, W) -> x, s (B, K, C): Eq. 4 of SAAM. Go on with the x that comes back."""
    if not torch.jit.is_scripting():  # noqa: SIM102
        if trains_eagerly(x):
            return _WeightedPool.apply(x, v)
    return x, v.flatten(2) @ x.flatten(2).transpose(1, 2)


def scale(
    x: torch.Tensor,
    v: torch.Tensor,
    shortcut: torch.Tensor | None = None,
    affine: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """x * v, + shortcut if there is one; with `affine` = (a, d), (a x + d) * v + shortcut.

    Shapes: x, shortcut (B, C, H, W), v (B, C), a, d (C).
    """
    if affine is not None:
        torch._assert(shortcut is not None, 'an affine map comes with a shortcut')
        a, d = affine
        v, bias = v * a, (v * d)[:, :, None, None]
    else:
        bias = None
    v = v.to(x.dtype)[:, :, None, None]
    if not torch.jit.is_scripting():  # noqa: SIM102
        if trains_eagerly(x):
            return _Scale.apply(x, v, bias, shortcut)
    if shortcut is None:
        return x * v
    y = torch.addcmul(shortcut, x, v)
    return y if bias is None else y.add_(bias)


def _own(grad: torch.Tensor) -> torch.Tensor:
    """What may be written to: `grad` itself, which only `_Scale.backward` made, or a copy if it is part of a graph."""
    return grad.clone() if torch.is_grad_enabled() else grad


def _max_pool(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest value of each map and its index in H*W, (B, C) each. x: (B, C, H, W)."""
    if not x.is_cpu:
        return x.flatten(2).max(2)
    f, index = F.max_pool2d(x, x.shape[2:], return_indices=True)  # on CPU the only one with vector instructions
    return f.flatten(1), index.flatten(1)


def _channel_sum(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """x (B, C, H, W), a (C) -> the sum over channels of a x, (B, 1, H, W)."""
    return torch.matmul(a, x.flatten(2)).view(x.shape[0], 1, x.shape[2], x.shape[3])


def _conv_by_sample(mean: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """conv2d(mean, weight) with the samples as the channels of a depthwise one: a third of the time on CPU, which has
    vector instructions over channels alone."""
    padding = weight.shape[2] // 2
    if not mean.is_cpu:
        return F.conv2d(mean, weight, padding=padding)
    b, _, h, w = mean.shape
    k = weight.shape[0]
    weights = weight.expand(b, *weight.shape).reshape(b * k, 1, *weight.shape[2:])
    return F.conv2d(mean.reshape(1, b, h, w), weights, padding=padding, groups=b).view(b, k, h, w)


class _MaxMinPool(Function):
    """Extremes with their indices. On CPU only where channels come last are they found with vector instructions."""

    @staticmethod
    def forward(x):
        f_max, i_max = _max_pool(x)
        f_min, i_min = _max_pool(-x)
        return x.view_as(x), f_max, -f_min, torch.stack([i_max, i_min], dim=2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[3])
        ctx.save_for_backward(output[3])

    @staticmethod
    def backward(ctx, g_x, g_max, g_min, _):
        (index,) = ctx.saved_tensors
        b, c, h, w = g_x.shape
        flat = _own(g_x).reshape(b, c, h * w)
        return flat.scatter_add_(2, index, torch.stack([g_max, g_min], dim=2)).reshape(b, c, h, w)


class _MaxMinCompare(Function):
    """Extremes found again by comparing: four fast passes over a map against one that has no vector instructions."""

    @staticmethod
    def forward(x):
        return x.view_as(x), x.amax((2, 3)), x.amin((2, 3))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g_x, g_max, g_min):
        (x,) = ctx.saved_tensors
        g_x = _own(g_x)
        mask = torch.empty_like(x)  # of x's dtype: as booleans these passes take several times as long
        for pool, g in ((torch.amax, g_max), (torch.amin, g_min)):
            with torch.no_grad():
                # not the f of the forward pass: x may have been computed again, and differ in the last bit
                torch.eq(x, pool(x, (2, 3), keepdim=True), out=mask)
                count = mask.sum((2, 3), dtype=torch.float32)
            share = (g / count).to(x.dtype)[:, :, None, None]
            g_x = g_x + mask.clone() * share if torch.is_grad_enabled() else g_x.addcmul_(mask, share)
        return g_x


class _MaxMinCompiled(Function):
    """Extremes with their indices, for torch.compile: the backward pass reads no map, and fuses with what follows."""

    @staticmethod
    def forward(x):
        f_max, i_max = x.flatten(2).max(2)
        f_min, i_min = x.flatten(2).min(2)
        return f_max, f_min, i_max.int(), i_min.int()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape = inputs[0].shape
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*output[2:])

    @staticmethod
    def backward(ctx, g_max, g_min, *_):
        i_max, i_min = (i[:, :, None] for i in ctx.saved_tensors)
        position = torch.arange(ctx.shape[2] * ctx.shape[3], dtype=torch.int32, device=i_max.device)
        g = torch.where(position == i_max, g_max[:, :, None], 0) + torch.where(position == i_min, g_min[:, :, None], 0)
        return g.view(ctx.shape)


class _ChannelMean(Function):
    @staticmethod
    def forward(x):
        return x.view_as(x), x.mean(1, keepdim=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g_x, g_mean):
        return _own(g_x).add_(g_mean, alpha=1 / g_x.shape[1])


class _ChannelSum(Function):
    @staticmethod
    def forward(x, a):
        return x.view_as(x), _channel_sum(x, a)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g_x, g_mean):
        x, a = ctx.saved_tensors
        g_a = (x.flatten(2) @ g_mean.flatten(2).transpose(1, 2)).sum((0, 2))
        return _own(g_x).addcmul_(g_mean, a[:, None, None]), g_a


class _SpatialMean(Function):
    @staticmethod
    def forward(x):
        return x.mean((2, 3))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx, g):
        # not written out to a map: autograd adds it to the other gradients of x as it is
        return (g / (ctx.shape[2] * ctx.shape[3]))[:, :, None, None].expand(ctx.shape)


class _FAWeight(Function):
    @staticmethod
    def forward(x, u, k):
        return torch.lerp(x, u, k)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, u, k = ctx.saved_tensors
        d = u - x
        d = d * g if torch.is_grad_enabled() else d.mul_(g)
        g_k = d.sum((1, 2, 3), keepdim=True)
        del d  # its memory is the next map's
        g_u = g * k
        return g - g_u, g_u, g_k


class _ScoreConv(Function):
    """Its gradients as forward convolutions: backward ones of a single channel take several times as long on CPU."""

    @staticmethod
    def forward(mean, weight):
        return _conv_by_sample(mean, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        mean, weight = (saved.to(g.dtype) for saved in ctx.saved_tensors)  # autocast may have run the forward
        padding = weight.shape[2] // 2
        g_mean = F.conv2d(g, weight.flip(2, 3).transpose(0, 1), padding=padding)
        g_weight = F.conv2d(mean.transpose(0, 1), g.transpose(0, 1), padding=padding).transpose(0, 1)
        return g_mean, g_weight


class _WeightedPool(Function):
    @staticmethod
    def forward(x, v):
        return x.view_as(x), v.flatten(2) @ x.flatten(2).transpose(1, 2)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g_x, g_s):
        x, v = ctx.saved_tensors
        g_s = g_s.to(x.dtype)  # autocast may have run the forward
        g_v = (g_s @ x.flatten(2)).view_as(v)
        g_x = _own(g_x)
        for k in range(v.shape[1]):
            g_x.addcmul_(g_s[:, k, :, None, None], v[:, k, None])
        return g_x, g_v


class _BatchStats(Function):
    """Mean and biased variance of a batch; updates the running ones as batch_norm does."""

    @staticmethod
    def forward(x, running_mean, running_var, momentum):
        if not torch.compiler.is_compiling():
            return x.view_as(x), *torch.batch_norm_update_stats(x, running_mean, running_var, momentum)
        # by maps, so that one pass finds the extremes too; shifted, so that no digits are lost where |mean| >> std
        shift = x[:, :, :1, :1]
        mean = (x - shift).mean((2, 3))
        var = (x - shift).square().mean((2, 3)) - mean.square()
        mean = mean + shift.flatten(1)
        var, mean = (var + (mean - mean.mean(0)).square()).mean(0), mean.mean(0)
        n = x.numel() // x.shape[1]
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (n / (n - 1)), momentum)
        return x.view_as(x), mean, var

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx, g_x, g_mean, g_var):
        x, mean = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        slope = g_var * (2 / n)
        offset = g_mean / n - slope * mean
        return _own(g_x).addcmul_(x, slope[:, None, None]).add_(offset[:, None, None]), None, None, None


class _Scale(Function):
    @staticmethod
    def forward(x, v, bias, shortcut):
        if shortcut is None:
            return x * v
        y = torch.addcmul(shortcut, x, v)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, g):
        x, v = ctx.saved_tensors
        gx = g * x
        g_v = gx.sum((2, 3), keepdim=True)
        g_x = g * v if torch.is_grad_enabled() else torch.mul(g, v, out=gx)  # a new map costs more than its arithmetic
        g_bias = g.sum((2, 3), keepdim=True) if ctx.needs_input_grad[2] else None
        return g_x, g_v, g_bias, g if ctx.needs_input_grad[3] else None
