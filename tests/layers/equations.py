"""The papers' equations in float64, one sample, channel and position at a time, as printed."""
# ruff: noqa: B023  (the functions of a table are called where they are made)

import torch


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def spem(x, p, gamma_e, beta_e, gamma_r, beta_r, reweight='sum', fixed_lambda=None):
    out = torch.empty_like(x)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            values = x[b, c].reshape(-1)
            f_max, f_min = values[0], values[0]
            for value in values[1:]:  # Eq. 1
                f_max = value if value > f_max else f_max
                f_min = value if value < f_min else f_min
            lam = fixed_lambda if fixed_lambda is not None else p[0] ** 2 / (p[0] ** 2 + p[1] ** 2)  # Eq. 3
            if reweight == 'public':
                f_max, f_min = f_max * gamma_r[c] + beta_r[c], f_min * gamma_r[c] + beta_r[c]
            u = lam * f_max + (1 - lam) * f_min  # Eq. 2
            v_exc = sigmoid(gamma_e[c] * u + beta_e[c])  # Eq. 4
            if reweight == 'unshared':
                g_max, g_min = gamma_r[0, c] * f_max + beta_r[0, c], gamma_r[1, c] * f_min + beta_r[1, c]
            elif reweight not in ('none', 'public'):
                g_max, g_min = gamma_r[c] * f_max + beta_r[c], gamma_r[c] * f_min + beta_r[c]
            if reweight == 'sum':
                v_rew = sigmoid(f_min * gamma_r[c] + f_max * gamma_r[c] + beta_r[c])  # Eq. 6
            else:
                v_rew = {
                    'unshared': lambda: sigmoid(g_max + g_min),
                    'no_sigmoid': lambda: gamma_r[c] * f_min + gamma_r[c] * f_max + beta_r[c],
                    'product': lambda: sigmoid(g_max * g_min),
                    'sigmoid_sum': lambda: sigmoid(g_max) + sigmoid(g_min),
                    'sigmoid_product': lambda: sigmoid(g_max) * sigmoid(g_min),
                    'max': lambda: sigmoid(g_max),
                    'min': lambda: sigmoid(g_min),
                    'none': lambda: torch.tensor(1.0, dtype=x.dtype),
                    'public': lambda: sigmoid(f_max + f_min),
                }[reweight]()
            out[b, c] = x[b, c] * (v_rew * v_exc)  # Eq. 7 is the product of the two v
    return out


def saam_score_map(x, conv):
    """conv: (K, 1, k, k). Returns V, (B, K, H, W)."""
    b, c, h, w = x.shape
    half = conv.shape[-1] // 2
    v = torch.empty(b, conv.shape[0], h, w, dtype=x.dtype)
    for i in range(b):
        u = sum(x[i, j] for j in range(c)) / c  # Eq. 5
        for k in range(conv.shape[0]):
            score = torch.zeros(h, w, dtype=x.dtype)
            for y in range(h):  # Eq. 6
                for z in range(w):
                    for dy in range(-half, half + 1):
                        for dz in range(-half, half + 1):
                            if 0 <= y + dy < h and 0 <= z + dz < w:
                                score[y, z] = score[y, z] + conv[k, 0, dy + half, dz + half] * u[y + dy, z + dz]
            v[i, k] = torch.exp(score) / torch.exp(score).sum()  # Eq. 7
    return v


def saam(x, conv, w1, w2):
    v = saam_score_map(x, conv)
    out = torch.empty_like(x)
    for i in range(x.shape[0]):
        g = 0
        for k in range(conv.shape[0]):
            s = torch.stack([(v[i, k] * x[i, c]).sum() for c in range(x.shape[1])])  # Eq. 4
            g = g + w2 @ torch.clamp(w1 @ s, min=0)  # Eq. 9
        r = sigmoid(g)  # Eq. 8
        for c in range(x.shape[1]):
            out[i, c] = r[c] * x[i, c]  # Eq. 10
    return out


def focus(x, w1, b1, w2, b2):
    pooled = torch.stack([torch.stack([m.sum() / m.numel() for m in sample]) for sample in x])  # Eq. 6
    return torch.stack([sigmoid(w2 @ torch.clamp(w1 @ row + b1, min=0) + b2) for row in pooled])  # Eq. 5, 7


def association(s, w3, b3, w4, b4):
    return torch.stack([sigmoid(w4 @ torch.clamp(w3 @ row + b3, min=0) + b4) for row in s])  # Eq. 8


def fa_weight(x, u, k):
    return torch.stack([x[i] + (u[i] - x[i]) * k[i, 0] for i in range(len(x))])  # Eq. 9


def batch_norm(x, weight, bias, eps):
    """In training: x (B, C, ...) by the mean and biased variance of its channels."""
    dims = [0, *range(2, x.ndim)]
    n = x.numel() // x.shape[1]
    mean = x.sum(dims, keepdim=True) / n
    var = ((x - mean) ** 2).sum(dims, keepdim=True) / n
    shape = [1, -1, *[1] * (x.ndim - 2)]
    return (x - mean) / (var + eps) ** 0.5 * weight.view(shape) + bias.view(shape)


def srm(x, cfc, eps, norm):
    """norm: (B, C) -> (B, C), the batch norm before the sigmoid."""
    n = x.shape[2] * x.shape[3]
    mean = x.sum((2, 3)) / n
    var = ((x - mean[:, :, None, None]) ** 2).sum((2, 3)) / n
    z = cfc[:, 0] * mean + cfc[:, 1] * (var + eps) ** 0.5
    return x * sigmoid(norm(z))[:, :, None, None]


def se(x, w1, w2, b1=0, b2=0):
    pooled = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    return x * sigmoid(torch.clamp(pooled @ w1.T + b1, min=0) @ w2.T + b2)[:, :, None, None]


def se2(x, w1, w2):
    pooled = x.sum((2, 3)) / (x.shape[2] * x.shape[3]), x.flatten(2).max(2).values
    return x * sigmoid(sum(torch.clamp(s @ w1.T, min=0) @ w2.T for s in pooled))[:, :, None, None]


def eca(x, weight):
    """weight: (k,), over neighbouring channels, with zeros beyond the first and the last."""
    pooled = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    half, c = len(weight) // 2, x.shape[1]
    z = torch.zeros_like(pooled)
    for j in range(c):
        near = [(i, j + i - half) for i in range(len(weight)) if 0 <= j + i - half < c]
        z[:, j] = sum(weight[i] * pooled[:, n] for i, n in near)
    return x * sigmoid(z)[:, :, None, None]


def sge(x, groups, weight, bias, eps):
    b, c, h, w = x.shape
    out = torch.empty_like(x)
    for i in range(b):
        for g in range(groups):
            part = x[i, g * c // groups : (g + 1) * c // groups]
            mean = part.sum((1, 2)) / (h * w)
            score = sum(part[j] * mean[j] for j in range(len(part)))
            centred = score - score.sum() / (h * w)
            score = centred / (((centred**2).sum() / (h * w)) ** 0.5 + eps)
            out[i, g * c // groups : (g + 1) * c // groups] = part * sigmoid(weight[g, 0] * score + bias[g, 0])
    return out


def cbam(x, w1, w2, conv, norm=lambda scores: scores):
    """norm: (B, 1, H, W) -> the same, the batch norm that timm's CbamModule has behind the convolution."""
    half = conv.shape[-1] // 2
    b, c, h, w = x.shape
    refined, scores = [], []
    for i in range(b):
        avg, largest = x[i].sum((1, 2)) / (h * w), torch.stack([m.max() for m in x[i]])
        y = x[i] * sigmoid(sum(w2 @ torch.clamp(w1 @ s, min=0) for s in (avg, largest)))[:, None, None]
        pooled = torch.stack([y.sum(0) / c, y.max(0).values])
        padded = torch.zeros(2, h + 2 * half, w + 2 * half, dtype=x.dtype)
        padded[:, half : half + h, half : half + w] = pooled
        k = conv.shape[-1]
        rows = [torch.stack([(conv[0] * padded[:, p : p + k, q : q + k]).sum() for q in range(w)]) for p in range(h)]
        refined.append(y)
        scores.append(torch.stack(rows)[None])
    return torch.stack(refined) * sigmoid(norm(torch.stack(scores)))
