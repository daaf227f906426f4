"""The slow, obvious twin: an uncompressed transformers model in which what a setting drops is masked instead."""

import contextlib

import torch

from effivlm.runtime import stages
from effivlm.runtime.attach import Session
from effivlm.runtime.cache import CACHE

STEPS = 6


class Watched(Session):
    """A session that remembers its last prefill, and rows that intra-LLM merges wrote."""

    def __enter__(self):
        super().__enter__()
        self.writes, self.plain = {}, stages.merge_rows
        return self

    def _cut_inside(self, state, i, module, hidden, kwargs):
        before = state.prompt.index

        def spy(x, where, merge):
            out = self.plain(x, where, merge)
            for row in range(len(before)):
                if x.data_ptr() == hidden[row].data_ptr() or x.shape[0] == before.shape[1]:
                    for t in merge.target.tolist():
                        self.writes.setdefault(i, {})[int(before[row, where[t]])] = out[where[t]]
                    break
            return out

        stages.merge_rows = spy
        try:
            return super()._cut_inside(state, i, module, hidden, kwargs)
        finally:
            stages.merge_rows = self.plain

    def finish(self, state, cache):
        self.seen = state
        super().finish(state, cache)
        self.entries = [(layer.index, layer.valid) for layer in cache.layers]  # before a sliding window forgets


def positions(model, inputs):
    """Positions of the uncompressed prompt, as `generate` derives them."""
    base = model.base_model
    if hasattr(base, "get_rope_index"):
        given = {k: inputs[k] for k in ("image_grid_thw", "attention_mask", "mm_token_type_ids") if k in inputs}
        return base.get_rope_index(inputs["input_ids"], **given)[0]
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


@contextlib.contextmanager
def masked(model, prefill, decode, length, embeds=None, writes=None):
    """Hide keys by 4-D masks: ``prefill`` layer -> [B, L] bool, ``decode`` layer -> [B, L] or [B, H, L] bool."""
    assert model.config._attn_implementation == "eager", "the twin needs masks that are never None"
    state = {"step": -1, "length": length}

    def count(module, args, kwargs):
        state["step"] += 1
        if state["step"] == 0 and embeds is not None:
            kwargs["inputs_embeds"] = embeds
        if state["step"] == 0 and writes and "deepstack" in writes:
            kwargs["deepstack_visual_embeds"] = writes["deepstack"]
        return args, kwargs

    def hide(i, module, args, kwargs):
        mask = kwargs["attention_mask"]
        first = state["step"] == 0
        keep = (prefill if first else decode)[i]
        keep = keep[:, None] if keep.ndim == 2 else keep
        total = length + state["step"]
        keep = torch.cat([keep, keep.new_ones(*keep.shape[:-1], total - keep.shape[-1])], -1)[..., -mask.shape[-1] :]
        drop = ~keep[:, :, None, :]
        if first:
            drop = drop & ~torch.eye(mask.shape[-1], dtype=torch.bool)
        kwargs["attention_mask"] = mask.masked_fill(drop, torch.finfo(mask.dtype).min)
        if first and writes and i in writes:
            hidden = args[0].clone()
            for at, row in writes[i].items():
                hidden[0, at] = row
            args = (hidden, *args[1:])
        return args, kwargs

    text = model.get_decoder()
    handles = [text.register_forward_pre_hook(count, with_kwargs=True)]
    for i, layer in enumerate(text.layers):
        handles.append(layer.register_forward_pre_hook(lambda m, a, k, i=i: hide(i, m, a, k), with_kwargs=True))
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def run(model, inputs, tokens, prefill, decode, embeds=None, writes=None, position=None):
    """[B, STEPS, V] logits of a teacher-forced uncompressed run under the masks."""
    position = positions(model, inputs) if position is None else position
    length, mask = inputs["input_ids"].shape[1], inputs["attention_mask"]
    steps = tokens.shape[1]
    with torch.no_grad(), masked(model, prefill, decode, length, embeds, writes):
        out = model(**inputs, position_ids=position, use_cache=True)
        logits = [out.logits[:, -1]]
        for t in range(steps - 1):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            out = model(
                input_ids=tokens[:, t : t + 1],
                attention_mask=mask,
                **{CACHE: getattr(out, CACHE)},
                position_ids=position[..., -1:] + 1 + t,
                use_cache=True,
            )
            logits.append(out.logits[:, -1])
    return torch.stack(logits, 1)


def kept_masks(session, heads):
    """What a watched session kept: prefill masks per layer, decode masks per layer (with a head axis where heads differ)."""
    prompt = session.seen.prompt
    prefill, decode = {}, {}
    for i in range(session.layers):
        index, valid = prompt.kept[i]
        prefill[i] = _mask(prompt.visual.shape, index, valid)
        index, valid = session.entries[i]
        if index.ndim == 2:
            decode[i] = _mask(prompt.visual.shape, index, valid)
        else:
            kv = index.shape[1]
            rows = [_mask(prompt.visual.shape, index[:, h], None if valid is None else valid[:, h]) for h in range(kv)]
            decode[i] = torch.stack(rows, 1).repeat_interleave(heads // kv, 1)
    return prefill, decode


def _mask(shape, index, valid):
    out = torch.zeros(shape, dtype=torch.bool)
    for b in range(shape[0]):
        out[b, index[b] if valid is None else index[b][valid[b]]] = True
    return out


def close(a, b, tol=1e-4):
    error = (a.double() - b.double()).abs().max().item()
    assert error < tol, f"logits differ by {error:.2g}"
