"""From a name in a recipe to a judge; plug-ins come through the group `sparring.judges`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from sparring.alignment.config import JudgeMember
from sparring.alignment.judges.pairwise import PairwiseJudge
from sparring.alignment.judges.protocol import Judge
from sparring.launch.errors import UsageError

GROUP = "sparring.judges"
PAIRRM_HUB_ID = "llm-blender/PairRM-hf"


def _verifier(
    path: str | None, *, relevance: bool = True, device: str | None = None, **settings: Any
) -> Judge:
    from sparring.alignment.judges.verifier import VerifierJudge

    if not relevance:
        return VerifierJudge(None, **settings)
    from sparring.alignment.judges.relevance import Relevance

    return VerifierJudge(Relevance(path, device), **settings)


def _pairrm(path: str | None, **options: Any) -> Judge:
    from sparring.alignment.judges.pairrm import PairRM

    return PairRM.from_pretrained(path or PAIRRM_HUB_ID, **options)


def _relevance(path: str | None, *, device: str | None = None, **settings: Any) -> Judge:
    from sparring.alignment.judges.relevance import Relevance, RelevanceJudge

    return RelevanceJudge(Relevance(path, device), **settings)


def _reward_model(path: str | None, **options: Any) -> Judge:
    if path is None:
        raise UsageError("the judge reward-model needs the path or hub id of a checkpoint")
    from sparring.alignment.judges.reward_model import RewardModel

    return RewardModel.from_pretrained(path, **options)


def _llm(path: str | None, **options: Any) -> Judge:
    if path is None:
        raise UsageError(
            "the judge llm needs judge.path: the model's name at the endpoint that base_url names, "
            "or without base_url a folder or hub id"
        )
    from sparring.alignment.judges.llm import LLMJudge

    return LLMJudge.build(path, **options)


def _ensemble(path: str | None, **options: Any) -> Judge:
    raise UsageError("the judge ensemble is made of [[judge.members]] tables, not of options")


_BUILT_IN: dict[str, Callable[..., Judge]] = {
    "verifier": _verifier,
    "relevance": _relevance,
    "pairrm": _pairrm,
    "reward-model": _reward_model,
    "llm": _llm,
    "ensemble": _ensemble,
}


def _plugins() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _imported(name: str) -> Callable[..., Judge]:
    try:
        return EntryPoint(name=name, value=name, group=GROUP).load()  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"judge {name!r} cannot be imported ({error}); module:callable must be on PYTHONPATH"
        ) from None


def judge_names() -> list[str]:
    """The judges that can be asked for: the built-in ones, then plug-ins by name."""
    return [*_BUILT_IN, *sorted(set(_plugins()) - set(_BUILT_IN))]


def build_judge(name: str, path: str | None = None, **options: Any) -> Judge:
    """Build a judge by name.

    Args:
        name: "verifier", "relevance", "pairrm", "reward-model", "llm" or a plug-in's ("ensemble"
            is what `build_ensemble` makes). A plug-in is a callable `(path, **options) -> Judge`,
            under the entry-point group `sparring.judges` or named as `module:callable`.
        path: checkpoint folder or hub id. None means the packaged MiniLM for verifier and
            relevance, the published PairRM-hf for pairrm; the others have no default.
        options: for the judge's constructor, such as `batch_size`, `device`, `min_relevance`;
            `relevance=False` runs the verifier without gate and tie-break.

    Raises:
        UsageError: unknown name or option.
        SparringError: the judge cannot be loaded.
    """
    factory = _BUILT_IN.get(name)
    if factory is None and ":" in name:
        factory = _imported(name)
    elif factory is None:
        plugins = _plugins()
        if name not in plugins:
            near = difflib.get_close_matches(name, judge_names(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UsageError(
                f"unknown judge {name!r}{hint} The judges are: {', '.join(judge_names())}"
            )
        factory = plugins[name].load()
    _refuse_unknown(name, options)
    return factory(path, **{key: _exact(value) for key, value in options.items()})


def _exact(value: Any) -> Any:
    """An option as it was meant: a command line gives "0.2" and "True" as text, a recipe may give
    the count 16 as 16.0."""
    if isinstance(value, str):
        if value in ("True", "False"):
            return value == "True"
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def build_ensemble(members: Sequence[JudgeMember]) -> Judge:
    """Build the judges of an ensemble, and the ensemble.

    Raises:
        UsageError: no member, equal labels, an unknown name or option.
        SparringError: a judge cannot be loaded.
    """
    from sparring.alignment.judges.ensemble import Ensemble, Member

    # vLLM chooses its accelerator first: not once another judge has put torch on one.
    order = sorted(range(len(members)), key=lambda n: members[n].name != "llm")
    built = {
        n: build_judge(members[n].name, members[n].path or None, **members[n].options)
        for n in order
    }
    return Ensemble([Member(m.label or m.name, built[n], m.weight) for n, m in enumerate(members)])


def open_cache(judge: Judge, folder: str) -> list[PairwiseJudge]:
    """Give every pairwise judge in here, members of an ensemble too, the cache in a folder.

    Returns:
        The judges that use it.

    Raises:
        UsageError: there is none: the judge does not ask about single pairs.
        SparringError: the folder cannot be used.
    """
    from sparring.alignment.judges.ensemble import Ensemble

    inside = [m.judge for m in judge.members] if isinstance(judge, Ensemble) else [judge]
    served = [one for one in inside if isinstance(one, PairwiseJudge)]
    if not served:
        raise UsageError(
            f"judge.cache = {folder!r} has no use: {judge.name} does not judge pair by pair "
            f"(pairrm and llm do); remove it"
        )
    for one in served:
        one.open_cache(folder)
    return served


def _refuse_unknown(name: str, options: dict[str, Any]) -> None:
    """Name an option a built-in judge does not have, before anything is loaded."""
    if name not in _BUILT_IN or not options:
        return
    known = set(_parameters(name))
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(
            f"judge {name} has no option {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(sorted(known))}"
        )


def _parameters(name: str) -> list[str]:
    if name == "verifier":
        from sparring.alignment.judges.verifier import VerifierJudge

        own = list(inspect.signature(VerifierJudge).parameters)
        return [*own, "device"]  # `relevance` is there already: here it is a switch
    if name == "relevance":
        return ["sharpness", "device"]
    if name == "ensemble":
        return []
    if name == "llm":
        from sparring.alignment.judges.llm import LLMJudge

        return list(inspect.signature(LLMJudge.build).parameters)[1:]
    if name == "pairrm":
        from sparring.alignment.judges.pairrm import PairRM

        return list(inspect.signature(PairRM.from_pretrained).parameters)[1:]
    from sparring.alignment.judges.reward_model import RewardModel

    return list(inspect.signature(RewardModel.from_pretrained).parameters)[1:]
