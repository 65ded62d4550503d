"""The `omniserve` command: generate, profile, demo, bench-host, model fetch, whose flags are EngineConfig's;
the others are in commands/."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from omniserve import __version__
from omniserve.commands import batch as batch_command
from omniserve.commands import bench as bench_command
from omniserve.commands import serve as serve_command
from omniserve.commands import state as state_command
from omniserve.commands.engine_flags import add_engine_flags, engine_settings
from omniserve.config import EngineConfig
from omniserve.errors import OmniServeError
from omniserve.types import (
    DEFAULT_CLASSES,
    CompletionOutput,
    RequestOutput,
    SamplingParams,
)

# Exit statuses: 1 something went wrong while running, 2 the command line itself (argparse's own).
EXIT_ERROR = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors are one line on standard error."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except OmniServeError as error:
        print(f"omniserve: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="omniserve", description=__doc__)
    parser.add_argument("--version", action="version", version=f"omniserve {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(
        commands.add_parser("generate", help="generate for prompts given here or on standard input")
    )
    _add_profile(commands.add_parser("profile", help="what the model costs on this machine, measured once"))
    demo = commands.add_parser("demo", help="chat and batch on a real model, in about a minute")
    demo.add_argument("--seconds", type=float, default=14.0, help="length of each of the two legs")
    demo.add_argument("--json", metavar="FILE", help="write what was measured to FILE as well")
    demo.set_defaults(run=_demo)
    bench_command.add_parser(commands)
    bench = commands.add_parser("bench-host", help="host attention beside the memory's streaming rate")
    bench.add_argument("--quick", action="store_true", help="a minute instead of the whole sweep")
    bench.add_argument("--json", metavar="FILE", help="write everything measured to FILE")
    bench.add_argument(
        "--plot", metavar="FILE", help="draw a roofline to FILE (.svg, .png; needs matplotlib)"
    )
    bench.set_defaults(run=_bench_host)
    batch_command.add_parser(commands)
    state_command.add_parser(commands)
    serve_command.add_parser(commands)
    model = commands.add_parser("model", help="models on this machine")
    actions = model.add_subparsers(required=True, metavar="ACTION")
    fetch = actions.add_parser("fetch", help="download and convert a model, or check that it is there")
    fetch.add_argument(
        "name", nargs="?", default="smollm2-135m", help="known or Hugging Face name, or a path"
    )
    fetch.add_argument("--revision", help="branch, tag or commit of a Hugging Face name")
    fetch.set_defaults(run=_fetch)
    return parser


def _add_generate(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("prompt", nargs="*", help="prompts; none: one per line of standard input")
    generate.add_argument("--chat", action="store_true", help="wrap each prompt in the model's chat template")
    generate.add_argument(
        "--service-class", choices=[kind.name for kind in DEFAULT_CLASSES], default="latency_sensitive"
    )
    generate.add_argument("--max-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0, help="default: 0, greedy")
    for name, kind in (("n", int), ("top-k", int), ("top-p", float), ("min-p", float), ("logprobs", int)):
        generate.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    for name in ("repetition", "presence", "frequency"):
        generate.add_argument(f"--{name}-penalty", type=float, default=argparse.SUPPRESS)
    generate.add_argument(
        "--stop", action="append", default=[], help="stop string; may be given several times"
    )
    generate.add_argument("--ignore-eos", action="store_true")
    generate.add_argument("--sampling-seed", type=int, help="fixes the noise of a temperature above 0")
    generate.add_argument("--json", action="store_true", help="one JSON object per prompt")
    generate.add_argument(
        "--stats", action="store_true", help="engine statistics on standard error at the end"
    )
    add_engine_flags(generate)
    generate.set_defaults(run=_generate)


def _add_profile(profile: argparse.ArgumentParser) -> None:
    profile.add_argument("--json", action="store_true", help="the whole profile on standard output")
    profile.add_argument("--plot", metavar="FILE", help="draw it to FILE (.svg, .png; needs matplotlib)")
    profile.add_argument("--refresh", action="store_true", help="measure again though a profile is cached")
    add_engine_flags(profile)
    profile.set_defaults(run=_profile)


def _generate(options: argparse.Namespace) -> int:
    from omniserve.engine.llm import LLM

    names = ["n", "top_k", "top_p", "min_p", "logprobs"]
    names += ["repetition_penalty", "presence_penalty", "frequency_penalty"]
    prompts = options.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    params = SamplingParams(
        temperature=options.temperature,
        max_tokens=options.max_tokens,
        ignore_eos=options.ignore_eos,
        stop=options.stop,
        seed=options.sampling_seed,
        **{name: getattr(options, name) for name in names if hasattr(options, name)},
    )
    with LLM(**engine_settings(options)) as llm:
        if options.chat:
            conversations = [[{"role": "user", "content": p}] for p in prompts]
            outputs = llm.chat(conversations, params, options.service_class)
        else:
            outputs = llm.generate(prompts, params, options.service_class)
        for output in outputs:
            for completion in output.outputs:
                print(_as_json(output, completion) if options.json else completion.text)
        num_lossy = sum(not output.metrics.is_exact for output in outputs)
        if num_lossy:
            count = f"{num_lossy} of {len(outputs)} texts"
            origin = _what_is_lossy(llm.config)
            print(f"omniserve: {count} come from {origin} and are not exact", file=sys.stderr)
        if options.stats:
            print(json.dumps(llm.stats(), indent=2), file=sys.stderr)
    return 0


def _what_is_lossy(config: EngineConfig) -> str:
    if config.quantization != "none":
        return f"{config.quantization} weights"
    return f"{config.host_kv_dtype} KV on the host"


def _as_json(output: RequestOutput, completion: CompletionOutput) -> str:
    """One object per text; its fields are CompletionOutput's, beside those of the prompt."""
    request = {"request_id": output.request_id, "prompt_token_ids": output.prompt_token_ids}
    return json.dumps(request | asdict(completion))


def _demo(options: argparse.Namespace) -> int:
    from omniserve.demo import run_demo

    return run_demo(options.seconds, options.json)


def _profile(options: argparse.Namespace) -> int:
    from omniserve.engine.profile_report import run_profile

    return run_profile(EngineConfig(**engine_settings(options)), options.json, options.plot, options.refresh)


def _bench_host(options: argparse.Namespace) -> int:
    from omniserve.bench.host_report import run_bench_host

    return run_bench_host(options.quick, options.json, options.plot)


def _fetch(options: argparse.Namespace) -> int:
    from omniserve.model.sources import ensure_model

    print(ensure_model(options.name, options.revision))
    return 0


if __name__ == "__main__":
    sys.exit(main())
