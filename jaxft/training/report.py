"""The report of a finished run: what it learned, what it forgot, and what that took."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Report:
    """What `report.json` holds. Losses are mean nats a target token; a rate or time is None when no step was timed.

    Attributes:
      base: the base model and a hash of its weights.
      method: names and options of the method or chain.
      steps, epochs: length of the run.
      parameters, trained_parameters: scalars of the tuned model, and how many of them trained.
      learned: mean fall of the loss over the target sets against the base model; None without such a set.
      forgot: mean rise of the loss over the retained sets; None without such a set.
      sets: per evaluation set `kind`, `base_loss`, `loss`, `change`, and accuracies for multiple choice.
      final_loss: training loss of the last step.
      step_seconds: median time of a step, without compilation, evaluation and saves.
      tokens_per_second, target_tokens_per_second: median rates, of tokens that are not padding, of those with a loss.
      peak_memory_bytes, peak_memory_of: peak of the fullest "device", or of the "process" where devices keep no count.
      skipped_steps: steps whose loss or gradient was not finite, which changed nothing.
      data: what was read, dropped and skipped (`DataReport`).
      output: the directory of the run.
    """

    base: str
    method: list[dict[str, Any]]
    steps: int
    epochs: float
    parameters: int
    trained_parameters: int
    learned: float | None
    forgot: float | None
    sets: Mapping[str, Mapping[str, Any]]
    final_loss: float | None
    step_seconds: float | None
    tokens_per_second: float | None
    target_tokens_per_second: float | None
    peak_memory_bytes: int
    peak_memory_of: str
    skipped_steps: int
    data: Mapping[str, Any]
    output: str


def report_markdown(report: Report) -> str:
    """The report as a page of Markdown."""
    names = " + ".join(method["name"] for method in report.method)
    share = 100 * report.trained_parameters / report.parameters
    lines = [
        f"# {names} on {report.base}",
        "",
        f"{report.steps} steps ({report.epochs:.2f} epochs), {report.trained_parameters:,} of {report.parameters:,} "
        f"parameters trained ({share:.2f} %).",
        "",
    ]
    if report.learned is not None:
        changed = "fell" if report.learned >= 0 else "rose"
        lines.append(f"- learned: loss on the target sets {changed} by **{abs(report.learned):.4f}** nats a token")
    if report.forgot is not None:
        changed = "rose" if report.forgot >= 0 else "fell"
        lines.append(f"- forgot: loss on the retained sets {changed} by **{abs(report.forgot):.4f}** nats a token")
    if report.sets:
        lines += ["", "| set | kind | base loss | loss | change |", "|---|---|---|---|---|"]
        for name, found in report.sets.items():
            lines.append(
                f"| {name} | {found['kind']} | {found['base_loss']:.4f} | {found['loss']:.4f} "
                f"| {found['change']:+.4f} |"
            )
        accuracies = {name: found for name, found in report.sets.items() if "accuracy" in found}
        if accuracies:
            lines += ["", "| set | base accuracy | accuracy |", "|---|---|---|"]
            lines += [f"| {n} | {f['base_accuracy']:.3f} | {f['accuracy']:.3f} |" for n, f in accuracies.items()]
    lines += ["", "| | |", "|---|---|"]
    if report.final_loss is not None:
        lines.append(f"| training loss of the last step | {report.final_loss:.4f} |")
    if report.step_seconds is not None:
        lines.append(f"| median step | {1e3 * report.step_seconds:.1f} ms |")
        lines.append(
            f"| tokens a second | {report.tokens_per_second:,.0f} "
            f"({report.target_tokens_per_second:,.0f} with a loss) |"
        )
    lines.append(f"| peak memory of the {report.peak_memory_of} | {report.peak_memory_bytes / 2**30:.2f} GiB |")
    lines.append(f"| steps skipped (loss not finite) | {report.skipped_steps} |")
    sources = report.data.get("sources", [])
    lost = {key: sum(s.get(key, 0) for s in sources) for key in ("malformed", "dropped_too_long", "dropped_untrained")}
    lines.append(f"| rows read | {sum(s.get('rows', 0) for s in sources):,} |")
    lines.append(
        f"| rows skipped | {lost['malformed']} malformed, {lost['dropped_too_long']} too long, "
        f"{lost['dropped_untrained']} without trained tokens |"
    )
    return "\n".join(lines) + "\n"
