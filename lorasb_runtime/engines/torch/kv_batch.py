"""Attention of one ragged batch over the KV cache: where each row writes and what it sees.

Rows of the batch: decoding sequences first, ordered by region, then the prefill chunks.
"""

from dataclasses import dataclass, field

import torch

from lorasb_runtime.engines.torch.kv_cache import KVCache
from lorasb_runtime.engines.torch.kv_regions import Region
from lorasb_runtime.engines.torch.scheduler import Step
from lorasb_runtime.ops.attention import attend_decode, attend_prefill, causal_bias, decode_bias

# Decoding rows are read in place, idle rows between them included, down to this share of use;
# below it the rows are gathered.
IN_PLACE_SHARE = 0.5


@dataclass(frozen=True)
class LayerCall:
    """What a model's attention layer asks for besides its tensors."""

    layer: int
    scaling: float
    window: int | None
    softcap: float | None


@dataclass
class DecodeGroup:
    """The decoding sequences of one size class: batch rows begin..end.

    rows, positions: int64 [n], where each new key goes. lengths: int64 [span], how many positions
    each cache row lo..hi sees (1 for idle rows, whose output nobody reads).
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
    _biases: dict[int | None, torch.Tensor] = field(default_factory=dict)

    @property
    def gathered(self) -> bool:
        return (self.end - self.begin) < IN_PLACE_SHARE * (self.hi - self.lo)

    def attend(self, cache: KVCache, q: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """[n, heads, d] -> [n, heads, d]."""
        keys = cache.keys[self.size][call.layer]
        values = cache.values[self.size][call.layer]
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
class PrefillSpan:
    """A prefill chunk: batch rows begin..end are positions start.. of the sequence in `region`."""

    region: Region
    start: int
    begin: int
    end: int
    _biases: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def attend(self, cache: KVCache, q: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """[heads, chunk, d] -> [heads, chunk, d]."""
        stop = self.start + self.end - self.begin
        k = cache.keys[self.region.size][call.layer][self.region.row, :, :stop]
        v = cache.values[self.region.size][call.layer][self.region.row, :, :stop]
        bias = None
        if self.start or (call.window is not None and stop > call.window):
            if call.window not in self._biases:
                self._biases[call.window] = causal_bias(self.start, stop, call.window, q)
            bias = self._biases[call.window]
        return attend_prefill(q, k, v, bias, call.scaling, call.softcap)


@dataclass
class KVBatch:
    """Handed through the model's forward to every attention layer; `windows`: what each asked."""

    cache: KVCache
    groups: list[DecodeGroup]
    prefills: list[PrefillSpan]
    windows: dict[int, int | None] = field(default_factory=dict)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: LayerCall
    ) -> torch.Tensor:
        """Store the new keys and values, then attend: [1, heads, tokens, d] -> same shape."""
        self.windows[call.layer] = call.window
        parts = []
        for group in self.groups:
            rows = slice(group.begin, group.end)
            for tensors, new in ((self.cache.keys, k), (self.cache.values, v)):
                own = new[0, :, rows].transpose(0, 1)
                tensors[group.size][call.layer][group.rows, :, group.positions] = own
            own_q = q[0, :, rows].transpose(0, 1)
            parts.append(group.attend(self.cache, own_q, call).transpose(0, 1))
        for span in self.prefills:
            rows = slice(span.begin, span.end)
            stop = span.start + span.end - span.begin
            for tensors, new in ((self.cache.keys, k), (self.cache.values, v)):
                target = tensors[span.region.size][call.layer]
                target[span.region.row, :, span.start : stop] = new[0, :, rows]
            parts.append(span.attend(self.cache, q[0, :, rows], call))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[None]


def build_kv_batch(cache: KVCache, step: Step, device: torch.device) -> KVBatch:
    """The batch of a scheduled step; orders `step.decodes` by region as the rows must be."""
    step.decodes.sort(key=lambda s: (s.region.size, s.region.row) if s.region else (0, 0))
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
            )
        )
    spans: list[PrefillSpan] = []
    begin = len(step.decodes)
    for chunk in step.prefills:
        assert chunk.sequence.region is not None
        spans.append(PrefillSpan(chunk.sequence.region, chunk.start, begin, begin + chunk.count))
        begin += chunk.count
    return KVBatch(cache, groups, spans)
