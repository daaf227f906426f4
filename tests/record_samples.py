"""Synthetic records for the tests of store, metrics and report."""

from effivlm.records import DocumentRecord, TimingRecord


def document(
    number=0,
    setting="none",
    task="colour",
    answer="red",
    score=1.0,
    references=None,
    metric="exact_match",
    model="tiny",
    error=None,
    share=1.0,
    cost=True,
    cluster="",
):
    failed = error is not None
    return DocumentRecord(
        model=model,
        setting=setting,
        task=task,
        document=f"d{number}",
        metric=metric,
        answer=None if failed else answer,
        score=None if failed else score,
        references=references or (f"red {number}",),  # no answer is right everywhere
        new_tokens=0 if failed else 2,
        finish="error" if failed else "stop",
        error=error,
        digest="0" * 16,
        cost=account(share) if cost and not failed else None,
        cluster=cluster,
    )


def account(share):
    kept = round(100 * share)
    return {
        "prompt_tokens": 120,
        "visual_tokens": 100,
        "visual_per_layer": [100, kept],
        "tokens_per_layer": [120, 20 + kept],
        "kv_per_layer": [120.0, 20.0 + kept],
        "kv_bytes": 64 * (140 + kept),
        "kv_bytes_held": 80 * (140 + kept),
        "prefill_flops": 1000 * (140 + kept),
        "decode_bytes_per_token": 5000 + 64 * (140 + kept),
        "realised": {
            "visual": share,
            "visual_mean": (1 + share) / 2,
            "prompt_kv": (140 + kept) / 240,
        },
    }


def timing(
    sample, setting="none", ttft=0.2, total=1.0, workload="effivlm-bench", model="tiny", **more
):
    return TimingRecord(
        model=model,
        setting=setting,
        workload=workload,
        sample=sample,
        seconds={"prefill": 0.9 * ttft, "ttft": ttft, "total": total},
        **more,
    )
