"""What the small-image networks share: stages with FA over blocks and stages, and timm's model API on top of them."""

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from timm.layers import ClassifierHead, get_device_dtype
from timm.models import checkpoint
from timm.models._features import feature_take_indices  # private: nothing public reads `indices`
from torch import nn

from ..layers import FA_GATES, FocusAssociation, create_gate, fa_weight, fa_weight_unskipped
from ..utils import UserError, look_up


def split_gate(
    model: str, gate: str | None, gate_kwargs: dict[str, Any] | None, carried: Iterable[str]
) -> tuple[str | None, bool]:
    """Return the channel gate that `gate` puts into the blocks, and True if FA goes over them.

    Args:
        model: whose constructor asks, for the messages.
        gate: as its argument.
        gate_kwargs: as its argument.
        carried: the gates that the model can have.

    Raises:
        UserError: a gate that the model cannot carry, or keyword arguments that no channel gate would take.
    """
    if gate is not None:
        look_up('gate', gate, carried, f'or None, for {model}')
    channel_gate = FA_GATES.get(gate, gate)
    if gate_kwargs and channel_gate is None:
        raise UserError(f'{model}: gate_kwargs={gate_kwargs} are of a channel gate, and gate={gate!r} is none')
    return channel_gate, gate in FA_GATES


def small_gates(
    model: str, gate: str | None, gate_kwargs: dict[str, Any] | None, rd_ratio: float, **dd
) -> tuple[Callable[[int], nn.Module | None], Callable[[int, int], FocusAssociation | None]]:
    """Makers of what VGG-19 and Inception-v4 carry: SE for a width, and FA for a width and an index.

    Each makes None where `gate` does not ask for it; block 0 is the benchmark of Eq. 2 and has no FA.
    """
    channel_gate, has_fa = split_gate(model, gate, gate_kwargs, ('se', *FA_GATES))
    se_kwargs = {'rd_ratio': rd_ratio, **(gate_kwargs or {}), **dd}
    return (
        lambda width: create_gate('se', width, **se_kwargs) if channel_gate else None,
        lambda width, index: FocusAssociation(width, index, **dd) if has_fa and index else None,
    )


class StageKs:
    """The k of the stages so far, which each gated stage appends to. A list, but one that tools do not copy.

    FSDP2 and accelerate rebuild the lists among a module's arguments; accelerate moves what has `to` by that.
    """

    def __init__(self) -> None:
        self.ks: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self.ks)

    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        return self.ks[index]

    def append(self, k: torch.Tensor) -> None:
        self.ks.append(k)

    def to(self, *args, **kwargs) -> 'StageKs':
        self.ks = [k.to(*args, **kwargs) for k in self.ks]
        return self


def no_ks() -> list[torch.Tensor]:
    """Start a forward pass's k of stages; to TorchScript a list is all that it is."""
    ks: list[torch.Tensor] = []
    if not torch.jit.is_scripting():
        ks = StageKs()
    return ks


def append_k(stage_ks: list[torch.Tensor], k: torch.Tensor, earlier: int) -> None:
    """Append a stage's k to its `earlier` ones, once: a checkpoint of the stage calls it again, with the list complete.

    A reentrant checkpoint ran it without gradients the first time, and later stages would send none back to it.
    """
    if len(stage_ks) == earlier:
        stage_ks.append(k)
    else:
        assert stage_ks[earlier].requires_grad == k.requires_grad, 'FA: checkpoint stages with use_reentrant=False'


class Stage(nn.Module):
    """Blocks of one width.

    With FA, blocks 1 ... n-1 carry a gate (`block.fa`), and so do all stages but the first (`self.fa`).

    Args:
        blocks: modules with forward(x, shortcut=None), of which the first gets `shortcut` of x, the others x alone:
            what replaces one of those may be of one argument.
        shortcut: matches the stage's input to its output in shape.
        fa: gate of the stage.
        reduction: comes before all of this.
    """

    has_fa: Final[bool]  #: where no block has a gate, a module that wraps a block needs no `fa`

    def __init__(
        self,
        blocks: list[nn.Module],
        shortcut: nn.Module | None = None,
        fa: FocusAssociation | None = None,
        reduction: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.reduction = reduction or nn.Identity()
        self.shortcut = shortcut or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        if shortcut is not None and blocks:
            blocks[0].needs_shortcut = True
        self.fa = fa
        self.grad_checkpointing = False
        self.note_fa()

    @torch.jit.ignore
    def note_fa(self) -> None:
        """Note which gates there are: after one was put in or taken out."""
        self.has_fa = any(block.fa is not None for block in self.blocks)
        self.earlier = 0 if self.fa is None else self.fa.index - 1  # gated stages before this one
        self.skip_threshold = 0.0
        self.skip_per_sample = True

    def forward(self, x: torch.Tensor, stage_ks: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Return the stage's output. A gated stage needs `stage_ks`, the earlier stages' k, and appends its own."""
        x = self.reduction(x)
        matched = self.shortcut(x)  # X of the stage
        if self.fa is None:
            return self.run_blocks(x, matched)
        assert stage_ks is not None, 'FA: a gated stage needs the k of the stages before it'
        k = self.fa(matched, stage_ks[: self.earlier])  # a copy: what checkpoints the gate calls it again, later
        append_k(stage_ks, k, self.earlier)
        if self.skip_threshold > 0 and not self.training:
            return self._run_unskipped(x, matched, k)
        return fa_weight(matched, self.run_blocks(x, matched), k)

    def run_blocks(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """Return U of the stage."""
        ks: list[torch.Tensor] = []
        skips = self.skip_threshold > 0 and not self.training
        for i, block in enumerate(self.blocks):
            skipped = False
            if self.has_fa:  # noqa: SIM102  nested, so that TorchScript leaves it out
                if skips and block.fa is not None:
                    skipped = True
                    ks = ks + [block.fa(x, ks)]
                    x = self._run_block_unskipped(i, x, ks[-1])
            if not skipped:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    u = checkpoint(block, x) if i else checkpoint(block, x, shortcut)
                else:
                    u = block(x) if i else block(x, shortcut)
                if self.has_fa:  # noqa: SIM102
                    # after the block, whose child it is: torchinfo counts a child twice that runs before its parent
                    if block.fa is not None:
                        ks = ks + [block.fa(x, ks)]  # a new list: what checkpoints the gate calls it again, later
                        u = fa_weight(x, u, ks[-1])
                x = u
        return x

    @torch.jit.unused  # a scripted model raises here
    def _run_unskipped(self, x: torch.Tensor, matched: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        run = lambda index: self.run_blocks(x[index], matched[index])  # noqa: E731
        return fa_weight_unskipped(matched, k, run, self.skip_threshold, self.skip_per_sample)

    @torch.jit.unused
    def _run_block_unskipped(self, i: int, x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        run = lambda index: self.blocks[i](x[index])  # noqa: E731
        return fa_weight_unskipped(x, k, run, self.skip_threshold, self.skip_per_sample)


def set_skip_threshold(model: nn.Module, threshold: float, per_sample: bool = True) -> None:
    """Skip blocks and stages whose k (FA, Eq. 8) falls below `threshold`, in evaluation.

    Args:
        model: one of ours with FA gates, or one that `insert(model, 'fa')` gave them.
        threshold: in [0, 1]. 0 is exactly the plain forward.
        per_sample: skip them for the samples below it, which runs the others gathered in a smaller batch.
            False: only where the whole batch is below it.

    Raises:
        UserError: a threshold outside [0, 1], or a model without FA, scripted or traced.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f'threshold={threshold} must lie in [0, 1]')
    if isinstance(model, torch.jit.ScriptModule | torch.fx.GraphModule):
        raise UserError('a scripted or traced model cannot skip: its code is fixed')
    if not any(isinstance(module, FocusAssociation) for module in model.modules()):
        raise UserError('nothing to skip: the model has no FA gates; *_fa and *_fase models have')
    for module in model.modules():
        if hasattr(module, 'skip_threshold'):
            module.skip_threshold = float(threshold)
            module.skip_per_sample = per_sample


class Stages(nn.ModuleList):
    """The stages of a network, which can be called, as `nn.Sequential(*list(model.children())[:-1])` does."""

    has_fa: Final[bool]  #: without, a stage is called with x alone, and what replaces one may be of one argument

    def __init__(self, stages: Iterable[nn.Module] | None = None) -> None:
        super().__init__(stages)
        self.note_fa()

    @torch.jit.ignore
    def note_fa(self) -> None:
        """Note if there are gates: after some were put in or taken out."""
        self.has_fa = any(isinstance(module, FocusAssociation) for module in self.modules())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stage_ks = no_ks()
        for stage in self:
            if self.has_fa:  # noqa: SIM108  a statement, so that TorchScript leaves the other out
                x = stage(x, stage_ks)
            else:
                x = stage(x)
        return x


class StagedNet(nn.Module):
    """A stem, stages and a head, with timm's model API.

    A subclass sets `stages`, `Stages` of modules with `forward(x, stage_ks)` as `Stage` has it, `head`, and
    `feature_info` (the stem's first, if it is one), and defines `forward_stem` and `stem_pattern`, of the stem's
    parameter names.

    Attributes:
        stem_feature: True if the stem's map is a feature. Features halve in size from one to the next, as decoders
            want them, so a stem whose map has the first stage's size is none.
    """

    stem_feature = True

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _set_head(self, num_classes: int, global_pool: str, drop_rate: float, device=None, dtype=None) -> None:
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = self.feature_info[-1]['num_chs']
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, device=device, dtype=dtype
        )
        self.head_hidden_size = self.head.num_features

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return regex patterns of parameter groups, by stage where `coarse`, else by block."""
        blocks = [(r'^stages\.(\d+)\.blocks\.(\d+)', None), (r'^stages\.(\d+)', (0,))]
        return dict(stem=self.stem_pattern, blocks=r'^stages\.(\d+)' if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.stages.modules():
            if hasattr(module, 'grad_checkpointing'):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def set_skip_threshold(self, threshold: float, per_sample: bool = True) -> None:
        """See `timm_poolattn.set_skip_threshold`."""
        set_skip_threshold(self, threshold, per_sample)

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        return 'head.fc' if name_only else self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the features of the stem, if it is one (`stem_feature`), and of the stages.

        Args:
            x: (B, C, H, W).
            indices: the last n if int, all if None, else these.
            norm: no effect: every stage ends normalised.
            stop_early: stop at the last index asked for.
            output_fmt: 'NCHW' only.
            intermediates_only: leave out the final features.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        first = int(self.stem_feature)  # index of the first stage
        take_indices, max_index = feature_take_indices(first + len(self.stages), indices)
        intermediates = []
        x = self.forward_stem(x)
        if first and 0 in take_indices:
            intermediates.append(x)
        stage_ks = no_ks()
        for i, stage in enumerate(self.stages[: max_index + 1 - first] if stop_early else self.stages, first):
            x = stage(x, stage_ks) if self.stages.has_fa else stage(x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages (and the head) that these intermediates do not need; returns their indices."""
        first = int(self.stem_feature)
        take_indices, max_index = feature_take_indices(first + len(self.stages), indices)
        prune_end = max_index + 1 - first < len(self.stages)
        self.stages = self.stages[: max_index + 1 - first]
        if prune_end:
            # the head is sized for the final features, so it goes with them
            self.num_features = self.head.in_features = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.stages(self.forward_stem(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))
