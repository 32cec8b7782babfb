"""Pivotal parameters tuning."""

from jaxft.methods.base import Method
from jaxft.methods.registry import register
from jaxft.methods.selection.scores import change
from jaxft.methods.selection.select import selection


@register(
    "pivotal-parameters-tuning",
    title="JEN-1 DreamStyler: Customized Musical Concept Learning via Pivotal Parameters Tuning",
    url="https://arxiv.org/abs/2406.12292",
    family="selection",
    learning_rate=1e-3,
    example={"budget": 0.25, "search_steps": 2},
)
def pivotal_parameters_tuning(budget: float | int = 0.2, search_steps: int = 50, on: str = "@linear") -> Method:
    """Find the matrices that a concept moves, then train those alone from the pretrained start.

    A short full run, theta0 -> theta1; matrices (of one layer each) are ranked by the root mean square of
    (theta1 - theta0) over that of theta0; the top fraction of the model trains, the rest stays bit by bit. A stacked
    leaf becomes `Split(trainable [k, ...], frozen [L - k, ...])`.

    Notes:
        Only the abstract describes the selection rule (learn which parameters are pivotal, tune those); this is its
        mechanism carried over to language models. Left behind: the diffusion model, the identifier tokens of concepts.

    Args:
        budget: matrices that train, of all selected ones: a fraction or a count.
        search_steps: length of the run that is measured and undone.
        on: selector of the candidates.
    """
    score = change(search_steps, relative=True)
    return selection(score, granularity="matrix", reduction="norm", budget=budget, per="model", on=on)
