"""Tasks of lm-evaluation-harness on a language model with an adapter on, beside its untouched base.

The harness (Gao et al. 2024, "The Language Model Evaluation Harness") asks, scores and counts; here the model is handed
to it as it stands in memory, with the adapter attached and routed, so that nothing has to be merged or written first.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from graftlm.core import use
from graftlm.errors import DataError, EnvironmentFault, Finding, nearest

__all__ = ["harness_scores", "need_harness"]


def need_harness() -> None:
    """Raise EnvironmentFault (E132) where lm-evaluation-harness is not installed, before anything expensive."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        message = f"--harness needs {error.name}, which is not installed"
        raise EnvironmentFault(Finding("E132", message, fix="pip install 'graftlm[harness]'")) from None


def harness_scores(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    max_length: int | None = None,
    max_rows: int | None = None,
    shots: int | None = None,
    batch: int = 8,
    with_base: bool = True,
) -> list[dict[str, Any]]:
    """One line a task and metric: what `model` scores as it is routed, and what it scores with every adapter off.

    Args:
        model: a causal or encoder-decoder language model, adapters attached.
        tokenizer: of that model.
        tasks: names that the harness knows, or paths of its task files (YAML). A task file may load data and name
            functions of its own: it is code that you trust.
        max_length: most tokens of a question with its answer; None takes what the model's config says.
        max_rows: most rows of each task.
        shots: examples shown before each question; None leaves it to the task.
        batch: rows at once.
        with_base: whether the untouched base is scored as well.

    Returns:
        Lines with `task`, `metric`, `higher_is_better`, `rows`, `tuned`, `tuned_stderr`, and `base`, `base_stderr`.

    Raises DataError (D195) with every task that is not there or cannot be loaded, EnvironmentFault (E132).

    Example:
        >>> harness_scores(model, tokenizer, ["hellaswag"], max_rows=200)[0]["tuned"]      # doctest: +SKIP
    """
    need_harness()
    with _quiet():
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        loaded = _loaded(tasks, shots)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=max_length)

        def scored() -> dict[str, dict[str, Any]]:
            given: Any = {"limit": max_rows, "bootstrap_iters": 0, "log_samples": False}
            found = lm_eval.evaluate(lm, loaded, **given)
            assert found is not None
            return dict(found)

        was_training = model.training
        model.eval()
        try:
            tuned = scored()
            base = {}
            if with_base:
                with use(model, None):
                    base = scored()
        finally:
            model.train(was_training)
    return _lines(tuned, base)


def _loaded(tasks: Sequence[str], shots: int | None) -> Any:
    """The tasks as the harness runs them: files by their own names, the rest out of its catalogue."""
    from lm_eval.tasks import TaskManager

    files = [Path(task) for task in tasks if task.endswith((".yaml", ".yml"))]
    faults = [Finding("D195", "there is no such task file", place=str(path)) for path in files if not path.is_file()]
    names = [task for task in tasks if not task.endswith((".yaml", ".yml"))]
    # The catalogue has thousands of files, and reading their heads takes seconds.
    manager: Any = TaskManager(include_defaults=bool(names))
    known = list(manager.all_tasks)
    for name in names:
        if name not in known:
            near = nearest(name, known, most=1)
            fix = f"--harness {near[0]}" if near else "--harness FILE.yaml, a task file of your own"
            faults.append(Finding("D195", f"the harness knows no task {name}", fix=fix))
    if faults:
        raise DataError(faults)
    try:
        loaded = manager.load([*map(str, files), *names])
    except Exception as error:  # of any kind: data that are not there, a file that is no task
        message = f"the harness cannot load {', '.join(tasks)}: {type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(Finding("D195", message[:300], fix="see that its data can be had from here")) from None
    for task in loaded["tasks"].values():
        if shots is not None:
            task.set_config(key="num_fewshot", value=shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return loaded


def _lines(tuned: dict[str, dict[str, Any]], base: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for task, scores in tuned["results"].items():
        for key, value in scores.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            line = {
                "task": task,
                "metric": metric if kind == "none" else f"{metric} ({kind})",
                "higher_is_better": tuned.get("higher_is_better", {}).get(task, {}).get(metric),
                "rows": tuned.get("n-samples", {}).get(task, {}).get("effective"),
            }
            for who, results in (("tuned", tuned), ("base", base)):
                if results:
                    own = results["results"][task]
                    stderr = own.get(f"{metric}_stderr,{kind}")
                    line |= {who: float(own[key]), f"{who}_stderr": stderr if isinstance(stderr, float) else None}
            found.append(line)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness's notes on itself left out, and its bars where nobody watches them."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with ExitStack() as stack:
        if not sys.stderr.isatty():  # its bars know of no setting
            stack.enter_context(redirect_stderr(io.StringIO()))
        try:
            yield
        finally:
            logger.setLevel(before)
