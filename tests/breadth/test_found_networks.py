"""What random networks have found, each with the reason why it failed."""

import pytest
from properties import violations
from random_networks import Network, Step

FOUND = {
    # a buffer was written over before backward computed with it anew
    "a buffer that is written and read, recomputed": (
        Network((Step("detach"), Step("buffer"), Step("attention")), tokens=1, width=8, trained=True), "exact budget",
    ),
    # what lies between a softmax and a product was neither saved nor recomputed: "infinite capacity path"
    "a checkpointed attention under a budget": (
        Network((Step("checkpoint", again=True),), autocast=True), "budget",
    ),
    # torch draws in backward again what a checkpoint drew for nobody, and saves its inputs: "a bug of the planner"
    "a checkpointed attention that nobody reads": (
        Network((Step("linear"), Step("checkpoint"), Step("linear", first=2))), "budget",
    ),
    # torch ran in backward again what was saved in two bits, and saved its input: "a bug of the planner"
    "a checkpoint of which all is saved that backward reads": (
        Network((Step("linear"), Step("checkpoint", option=1, frozen=True))), "budget",
    ),
    # forward did not draw what nobody reads, so that the second mask was another than under eager
    "a mask after a checkpoint that nobody reads": (
        Network((Step("checkpoint", option=1), Step("checkpoint", first=1, option=1))), "exact",
    ),
    # backward's z was merged with forward's and saved, beside the norm's input
    "a frozen norm of what is saved anyway": (
        Network((Step("linear"), Step("linear"), Step("linear", returned=True), Step("norm", 1, 0, 1, True))), "paper",
    ),
    # what was compared with a maximum was saved, though a maximum made anew is the same to the bit
    "a maximum of a maximum": (
        Network((Step("join", 3, 1, 3, again=True),), tokens=1, width=64, trained=True), "exact",
    ),
    # what is compared for equality was not made anew, though the cut saved what the comparison answers
    "a maximum of which the comparison is saved": (
        Network((
            Step("detach", 2, 1, 5, returned=True), Step("buffer", 2, 3, 15), Step("checkpoint", 3, 3, 16, True),
            Step("activation", 0, 3, 6), Step("norm", 0, 1, 22, returned=True), Step("view", 2, 0, 19),
            Step("lookup", 2, 1, 14), Step("join", 0, 3, 14),
        ), batch=3, tokens=7, width=8, trained=True, dynamic=True), "exact",
    ),
    # backward compares a sum with its maximum: stock saves the maximum and makes the sum anew, which may find no equal
    "a maximum over what is made anew": (
        Network((Step("linear"), Step("activation"), Step("join"), Step("reduction", option=17)), 4, 16, 32), "exact",
    ),
    # a linear computed twice was merged, and views of the one counted as tensors beside those of the other
    "keys of a double attention": (
        Network((
            Step("linear"), Step("linear", 2, 0, 13), Step("write"), Step("linear", 2, 2, 7, returned=True),
            Step("linear", 1, 3, 15, returned=True), Step("attention", 2, 3, 3, True, True, True),
            Step("linear", 1, 3, 15, returned=True),
        ), batch=1, tokens=1, width=8, inputs=2), "two bits",
    ),
    # zeros through a linear are its bias, and were taken for a copy of it
    "a linear of zeros": (
        Network((
            Step("activation", 0, 1, 5, True, returned=True), Step("join", 2, 2, 13), Step("write", 3, 2, 10, True),
            Step("linear", 2, 2, 7, returned=True), Step("linear", 1, 3, 15, returned=True),
            Step("attention", 2, 3, 3, True, True, True), Step("join", 2, 3, 19),
        ), batch=1, tokens=1, width=8, inputs=2), "two bits",
    ),
    # what a maximum compares with a checkpointed value was saved, which is made anew in any case
    "a maximum over what is checkpointed": (
        Network((
            Step("residual", 3, 1, 2, True), Step("detach", 3, 2, 8), Step("write", 1, 1, 3, True, True),
            Step("checkpoint", 2, 2, 9, returned=True), Step("no_gradient", 2, 2, 4, True),
            Step("no_gradient", 2, 1, 4), Step("dropout", 2, 3, 8), Step("join", 2, 3, 3, returned=True),
        ), batch=3, tokens=16, width=32, autocast=True, dynamic=True), "exact",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    assert not violations(*FOUND[name])
