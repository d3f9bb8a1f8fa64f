"""The grammar of names: what is written can be taken apart again, and is what lists have."""

from __future__ import annotations

import itertools

import pytest

from megascale_moe.engine.names import (
    Name,
    grad,
    in_layer,
    in_micro,
    is_grad,
    parse,
    prefixed,
    recomputed,
    suffixed,
    term,
    without_micro,
)


@pytest.mark.parametrize("tensor", ["ffn_in", "attention.qkv.weight", "rope.graph", "encode d:x", "hidden_3"])
def test_every_name_is_taken_apart_as_it_was_put_together(tensor: str) -> None:
    parts = itertools.product((None, 0, 12), (None, 3), (None, 5), (False, True), (0, 2), (False, True))
    for layer, piece, micro, gradient, number, again in parts:
        name = Name(tensor, layer, piece, micro, gradient, number, again)
        assert parse(str(name)) == name


def test_words_of_the_grammar() -> None:
    assert str(Name("ffn_in", 3, 2, 5, gradient=True, term=1)) == "5/d:layers.3.ffn_in@2#1"
    assert in_micro(grad(in_layer(3, "ffn_in", 2)), 5) == "5/d:layers.3.ffn_in@2"
    assert term(grad("x"), 2) == "d:x#2"
    assert recomputed("layers.0.x") == "layers.0.x~"
    assert is_grad("d:x")
    assert not is_grad("dx")
    assert without_micro("5/d:layers.3.x") == "d:layers.3.x"
    assert without_micro("x") == "x"


def test_what_is_made_of_something_stays_at_its_place() -> None:
    assert prefixed("encode", "layers.3.dispatch@1") == "layers.3.encode dispatch@1"
    assert prefixed("coded", "d:layers.3.x") == "layers.3.coded d:x"  # not a gradient that a list would prune
    assert suffixed("layers.3.ln1_out@1", "scale") == "layers.3.ln1_out.scale@1"


def test_what_is_no_name_is_refused() -> None:
    with pytest.raises(ValueError, match="is not a name"):
        parse("a@b@c")
