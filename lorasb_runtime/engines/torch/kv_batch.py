"""Attention of one ragged batch over the KV cache: where each row writes and what it sees.

Rows of the batch: decoding sequences first, ordered by region, then the prefill chunks. Where a
kernel attends, it takes all sequences of one size class that have few new tokens, in one call.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from lorasb_runtime.engines.torch.kv_cache import KVCache
from lorasb_runtime.engines.torch.kv_regions import Region
from lorasb_runtime.engines.torch.scheduler import Step
from lorasb_runtime.engines.torch.sequence import Sequence
from lorasb_runtime.ops.attention import attend_decode, attend_prefill, causal_bias, decode_bias
from lorasb_runtime.ops.attention_cpu import attend_cached, attention_kernel

# Decoding rows are read in place, idle rows between them included, down to this share of use;
# below it the rows are gathered.
IN_PLACE_SHARE = 0.5
# A prompt's tokens are the kernel's up to so many pairs of one of them and one that it may see;
# with more, a multiply of all at once is faster.
MOST_KERNEL_PAIRS = 1 << 12


# Of the batch's new tokens: [n, heads, d] and twice [n, kv_heads, d].
QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LayerCall:
    """What a model's attention layer asks for besides its tensors."""

    layer: int
    scaling: float
    window: int | None
    softcap: float | None


class Attends(Protocol):
    """What an attention layer hands its queries, keys and values to."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        """[tokens, heads, d] and twice [tokens, kv_heads, d] -> [tokens, heads, d]."""


class Part(Protocol):
    """Some rows of a batch."""

    def store_and_attend(
        self, cache: KVCache, qkv: QKV, out: torch.Tensor, call: LayerCall
    ) -> None:
        """Take the part's own rows of qkv, and write those of `out`, [tokens, heads, d]."""


@dataclass(frozen=True)
class KernelSpans:
    """Sequences of one size class with few new tokens; spans: as of `attend_cached`."""

    size: int
    spans: torch.Tensor

    def store_and_attend(
        self, cache: KVCache, qkv: QKV, out: torch.Tensor, call: LayerCall
    ) -> None:
        kernel = attention_kernel(out.dtype, out.device)
        assert kernel is not None
        attend_cached(
            kernel,
            qkv,
            out,
            (cache.keys[self.size][call.layer], cache.values[self.size][call.layer]),
            self.spans,
            scaling=call.scaling,
            window=call.window,
            softcap=call.softcap,
        )


@dataclass
class DecodeGroup:
    """The decoding sequences of one size class: batch rows begin..end.

    rows, positions: int64 [n], where each new key goes. lengths: int64 [span], how many positions
    each cache row lo..hi sees (1 for idle rows, whose output nobody reads); `gathered`: the rows
    are brought together instead, and these three not used.
    """

    size: int
    begin: int
    end: int
    rows: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor
    width: int
    lo: int
    hi: int
    gathered: bool
    _biases: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def forget(self) -> None:
        """Begin a new step: `positions` have changed."""
        self._biases.clear()

    def store_and_attend(
        self, cache: KVCache, qkv: QKV, out: torch.Tensor, call: LayerCall
    ) -> None:
        q, *new = (tensor[self.begin : self.end] for tensor in qkv)
        cached = cache.keys[self.size][call.layer], cache.values[self.size][call.layer]
        for tensor, added in zip(cached, new, strict=True):
            tensor[self.rows, :, self.positions] = added
        out[self.begin : self.end] = self._attend(*cached, q, call)

    def _attend(
        self, keys: torch.Tensor, values: torch.Tensor, q: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        """[n, heads, d] -> [n, heads, d]."""
        if self.gathered:
            k = keys[:, :, : self.width].index_select(0, self.rows)
            v = values[:, :, : self.width].index_select(0, self.rows)
            bias = self._bias(self.positions + 1, call.window, q)
            return attend_decode(q, k, v, bias, call.scaling, call.softcap)
        k = keys[self.lo : self.hi, :, : self.width]
        v = values[self.lo : self.hi, :, : self.width]
        if self.hi - self.lo == q.shape[0]:
            bias = self._bias(self.lengths, call.window, q)
            return attend_decode(q, k, v, bias, call.scaling, call.softcap)
        spread = q.new_zeros(self.hi - self.lo, *q.shape[1:])
        spread[self.rows - self.lo] = q
        bias = self._bias(self.lengths, call.window, spread)
        out = attend_decode(spread, k, v, bias, call.scaling, call.softcap)
        return out[self.rows - self.lo]

    def _bias(self, lengths: torch.Tensor, window: int | None, q: torch.Tensor) -> torch.Tensor:
        if window not in self._biases:
            self._biases[window] = decode_bias(lengths, self.width, window, q)
        return self._biases[window]


@dataclass
class Span:
    """New tokens of one sequence: batch rows begin..end are positions start.. in its region."""

    region: Region
    start: int
    begin: int
    end: int
    _biases: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.end - self.begin

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.start + self.count

    def store_and_attend(
        self, cache: KVCache, qkv: QKV, out: torch.Tensor, call: LayerCall
    ) -> None:
        q, *new = (tensor[self.begin : self.end].transpose(0, 1) for tensor in qkv)
        stop = self.stop
        size, row = self.region.size, self.region.row
        cached = [t[size][call.layer][row] for t in (cache.keys, cache.values)]
        for tensor, added in zip(cached, new, strict=True):
            tensor[:, self.start : stop] = added
        if attention_kernel(out.dtype, out.device) is None:
            # Decoding weighs by zero what lies behind, where a NaN may have been left.
            for tensor in cached:
                tensor[:, stop:] = 0
        k, v = (tensor[:, :stop] for tensor in cached)
        bias = None
        if self.start or (call.window is not None and stop > call.window):
            if call.window not in self._biases:
                self._biases[call.window] = causal_bias(self.start, stop, call.window, q)
            bias = self._biases[call.window]
        attended = attend_prefill(q, k, v, bias, call.scaling, call.softcap)
        out[self.begin : self.end] = attended.transpose(0, 1)


@dataclass
class KVBatch:
    """Handed through the model's forward to every attention layer; `windows`: what each asked."""

    cache: KVCache
    parts: list[Part]
    windows: dict[int, int | None] = field(default_factory=dict)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        """Store the new keys and values, then attend: [tokens, heads, d] -> same shape."""
        self.windows[call.layer] = call.window
        out = q.new_empty(q.shape)
        for part in self.parts:
            part.store_and_attend(self.cache, (q, k, v), out, call)
        return out


def order_by_region(sequences: list[Sequence]) -> None:
    """As the rows of a batch are."""
    sequences.sort(key=lambda s: (s.region.size, s.region.row) if s.region else (0, 0))


def build_kv_batch(
    cache: KVCache, step: Step, device: torch.device, most_pairs: int | None = None
) -> KVBatch:
    """The batch of a scheduled step; orders `step.decodes` by region as the rows must be.

    most_pairs: what a prompt may have to be the kernel's; None: MOST_KERNEL_PAIRS.
    """
    order_by_region(step.decodes)
    chunks = []
    begin = len(step.decodes)
    for chunk in step.prefills:
        assert chunk.sequence.region is not None
        chunks.append(Span(chunk.sequence.region, chunk.start, begin, begin + chunk.count))
        begin += chunk.count
    if attention_kernel(cache.dtype, device) is None:
        return KVBatch(cache, [*_decode_groups(step, device), *chunks])
    most = MOST_KERNEL_PAIRS if most_pairs is None else most_pairs
    few: dict[int, list[tuple[int, int, int, int]]] = {}  # by size class: columns of its spans
    many: list[Part] = []
    for row, sequence in enumerate(step.decodes):
        assert sequence.region is not None
        column = row, 1, sequence.region.row, sequence.computed - 1
        few.setdefault(sequence.region.size, []).append(column)
    for span in chunks:
        if span.count * span.stop > most:
            many.append(span)
            continue
        column = span.begin, span.count, span.region.row, span.start
        few.setdefault(span.region.size, []).append(column)
    spans = [KernelSpans(size, torch.tensor(own).t().contiguous()) for size, own in few.items()]
    return KVBatch(cache, [*spans, *many])


def _decode_groups(step: Step, device: torch.device) -> list[DecodeGroup]:
    groups: list[DecodeGroup] = []
    for size in sorted({s.region.size for s in step.decodes if s.region}):
        begin = groups[-1].end if groups else 0
        members = [s for s in step.decodes if s.region and s.region.size == size]
        rows = [s.region.row for s in members if s.region]
        lo, hi = rows[0], rows[-1] + 1
        lengths = [1] * (hi - lo)
        for row, sequence in zip(rows, members, strict=True):
            lengths[row - lo] = sequence.computed
        groups.append(
            DecodeGroup(
                size=size,
                begin=begin,
                end=begin + len(members),
                rows=torch.tensor(rows, device=device),
                positions=torch.tensor([s.computed - 1 for s in members], device=device),
                lengths=torch.tensor(lengths, device=device),
                width=max(s.computed for s in members),
                lo=lo,
                hi=hi,
                gathered=len(members) < IN_PLACE_SHARE * (hi - lo),
            )
        )
    return groups
