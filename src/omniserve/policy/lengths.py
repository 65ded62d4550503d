"""How long texts of a class have been: what admission and the division of slack expect of the next ones."""

from __future__ import annotations

from dataclasses import dataclass, field

from omniserve.policy.request import Request

# Weight of the newest text in the running means: the last few dozen texts count.
NEWEST = 1 / 16
# Expected of a class of which no text has ended yet, where max_tokens allows more.
PRIOR_OUTPUT = 256


@dataclass(slots=True)
class Lengths:
    """Running means over finished texts, by service class: prompt and generated tokens."""

    _means: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, request: Request) -> None:
        new = (float(request.num_prompt), float(request.num_out))
        old = self._means.get(request.service_class, new)
        self._means[request.service_class] = (
            old[0] + NEWEST * (new[0] - old[0]),
            old[1] + NEWEST * (new[1] - old[1]),
        )

    def expected_output(self, request: Request) -> int:
        """Tokens that a request may be expected to generate in all: its class's mean, at least one more than
        it has, at most its max_tokens.
        """
        means = self._means.get(request.service_class)
        mean = PRIOR_OUTPUT if means is None else round(means[1])
        return min(request.max_tokens, max(mean, request.num_tokens - request.num_prompt + 1))

    def outputs_per_prompt_token(self, request: Request) -> float:
        """Tokens that will follow from each prompt token of a text of this request's class."""
        own = (float(request.num_prompt), float(min(request.max_tokens, PRIOR_OUTPUT)))
        prompt, output = self._means.get(request.service_class, own)
        return output / max(1.0, prompt)

    def usual(self, service_class: str, num_prompt: int) -> tuple[int, int]:
        """Prompt and output tokens of its finished texts in the mean; `num_prompt` and a guess before any."""
        prompt, output = self._means.get(service_class, (float(num_prompt), float(PRIOR_OUTPUT)))
        return max(1, num_prompt, round(prompt)), max(1, round(output))
