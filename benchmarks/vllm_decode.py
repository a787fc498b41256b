"""Decoding speed of stock vLLM without adapters, for `multi_adapter.py`.

    echo 32 | <python of an environment with vllm> benchmarks/vllm_decode.py MODEL

For each batch size that it reads, a line of JSON with the tokens per second; the first one, when it
is ready, is empty. It imports nothing of ours, so that it runs in vLLM's own environment.
"""

import argparse
import json
import os
import sys
import time

# vLLM leaves cores unused by default; here its worker has all of this process's.
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="vLLM decoding speed")
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--largest", type=int, default=64, help="batch size")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--compiled", action="store_true", help="vLLM's default mode, not eager")
    options = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    llm = LLM(
        options.model,
        dtype=options.dtype,
        enforce_eager=not options.compiled,
        max_model_len=2048,
        max_num_seqs=options.largest,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
    for batch in (1, options.largest):  # warms up
        decode_rate(llm.llm_engine, batch, options.prompt, params)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        rate = decode_rate(llm.llm_engine, int(line), options.prompt, params)
        print(json.dumps({"tokens_per_second": rate}), flush=True)


def decode_rate(engine: object, batch: int, prompt: int, params: object) -> float:
    """Tokens per second from the step after which all requests decode."""
    for n in range(batch):
        tokens = [100 + (7 * n + 13 * i) % 1000 for i in range(prompt)]
        engine.add_request(f"{time.monotonic_ns()}-{n}", {"prompt_token_ids": tokens}, params)
    counts: dict[str, int] = {}
    marks = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
        if len(counts) == batch:
            marks.append((time.perf_counter(), sum(counts.values())))
    (began, first), (ended, last) = marks[0], marks[-1]
    return (last - first) / (ended - began)


if __name__ == "__main__":
    main()
