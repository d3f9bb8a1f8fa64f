"""A checkpoint loads in every layout, and holds everything exactly once."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megascale_moe.checkpoint import Checkpoint, SaveError, TensorPiece, latest, save
from megascale_moe.checkpoint import files as files_module
from megascale_moe.checkpoint.boxes import Box
from tests.checkpoint.checkpoints import (
    EXPERTS,
    W13,
    assert_holds,
    boxed,
    make_state,
    names,
    save_alone,
    save_on,
    save_state,
    shares,
    whole,
)


@pytest.mark.parametrize(("ep", "dp"), [(1, 1), (4, 2), (2, 3), (8, 1)])
def test_whole_tensors_from_any_layout(tmp_path: Path, small_blocks: None, ep: int, dp: int) -> None:
    state = make_state()
    assert save_state(tmp_path, 5, state, ep, dp) == [tmp_path / "step-5"] * (ep * dp)
    assert_holds(tmp_path / "step-5", state)
    checkpoint = Checkpoint(tmp_path / "step-5")
    assert (checkpoint.step, checkpoint.world, checkpoint.extra) == (5, ep * dp, {"step": 5})
    assert latest(tmp_path) == tmp_path / "step-5"
    files = [f"rank-{rank:05d}.safetensors" for rank in range(ep * dp)]
    assert names(tmp_path / "step-5") == ["manifest.json", *files]


def test_any_box_and_any_flat_range(tmp_path: Path, small_blocks: None) -> None:
    state = make_state()
    save_state(tmp_path, 1, state, ep=4, dp=2)
    checkpoint = Checkpoint(tmp_path / "step-1")
    for name in (W13, "exp_avg.layers.3.ffn.experts.w13"):
        value = state[name]
        for offset in product((0, 3, 7), (0, 2), (0, 4)):
            size = (EXPERTS - offset[0], 3, 1)
            expected = value[Box(offset, size).slices((0, 0, 0))]
            assert torch.equal(checkpoint.read(name, offset, size), expected)
            for start, values in shares(expected.flatten(), 3):
                assert torch.equal(checkpoint.read_flat(name, offset, size, start, values.numel()), values)


def test_columns_saved_by_tensor_parallel_ranks(tmp_path: Path) -> None:
    value = torch.randn(6, 8)
    parts = [boxed("w", value, (0, column), (6, 2)) for column in range(0, 8, 2)]
    save(tmp_path, 1, parts, {}, rank=0, world=1, barrier=lambda: None)
    assert_holds(tmp_path / "step-1", {"w": value})
    assert torch.equal(Checkpoint(tmp_path / "step-1").read("w", (2, 3), (3, 4)), value[2:5, 3:7])


def test_what_is_read_does_not_change_the_file(tmp_path: Path) -> None:
    state = make_state()
    checkpoint = Checkpoint(save_alone(tmp_path, 1, state))
    checkpoint.read("parameters.norm.weight", (0,), (7,)).zero_()
    assert_holds(tmp_path / "step-1", state)


def test_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    state = make_state()
    save_state(tmp_path, 1, state, ep=2, dp=2)
    with safe_open(tmp_path / "step-1" / "rank-00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(W13), state[W13][:4].flatten())
        assert torch.equal(file.get_tensor("buffers.tokens"), state["buffers.tokens"])


def test_no_pickle_on_the_disk(tmp_path: Path) -> None:
    save_state(tmp_path, 1, make_state(), ep=2)
    assert {path.suffix for path in (tmp_path / "step-1").iterdir()} == {".json", ".safetensors"}
    json.loads((tmp_path / "step-1" / "manifest.json").read_text())
    package = Path(files_module.__file__).parent
    imports = [line for path in package.glob("*.py") for line in path.read_text().splitlines() if "import" in line]
    assert not [line for line in imports if "pickle" in line]


def test_ten_thousand_pieces(tmp_path: Path) -> None:
    """Linear in pieces: this takes a second, where comparing all with all would take minutes."""
    experts = torch.arange(2000 * 2 * 2).view(2000, 2, 2)
    pieces = [boxed("layers.0.ffn.experts.w", experts, (index, 0, 0), (1, 2, 2)) for index in range(2000)]
    flat = torch.arange(4000).view(40, 100)
    pieces += [TensorPiece("flat", (40, 100), (0, 0), (40, 100), at, flat.view(-1)[at : at + 1]) for at in range(4000)]
    tensors = {f"small.{index}": torch.tensor([index]) for index in range(4000)}
    pieces += [whole(name, value) for name, value in tensors.items()]
    path = save(tmp_path, 1, pieces, {}, rank=0, world=1, barrier=lambda: None)
    assert_holds(path, {"layers.0.ffn.experts.w": experts, "flat": flat, **tensors})


def test_missing_expert_is_named(tmp_path: Path) -> None:
    value = torch.randn(EXPERTS, 2, 2)
    pieces = [boxed("layers.0.ffn.experts.w2", value, (index, 0, 0), (1, 2, 2)) for index in range(EXPERTS)]
    del pieces[5]
    with pytest.raises(SaveError, match=r"layers\.0\.ffn\.experts\.w2: expert 5 is missing"):
        save(tmp_path, 1, pieces, {}, rank=0, world=1, barrier=lambda: None)
    assert names(tmp_path) == []


def test_experts_keyed_by_local_index_are_refused_on_all_ranks(tmp_path: Path) -> None:
    """The bug of other libraries: every rank calls its experts 0 to 3, so half of them overwrite the others."""
    local = torch.randn(4, 2, 2)

    def action(rank: int, barrier: Callable[[], None]) -> Path:
        pieces = [TensorPiece("layers.0.ffn.experts.w2", (8, 2, 2), (0, 0, 0), (4, 2, 2), 0, local.flatten())]
        return save(tmp_path, 1, pieces, {}, rank=rank, world=2, barrier=barrier)

    for error in save_on(2, action):
        assert isinstance(error, SaveError)
        assert "layers.0.ffn.experts.w2: expert 0 is there 2 times" in str(error)
    assert names(tmp_path) == []


def test_missing_element_of_a_flat_range_is_named(tmp_path: Path) -> None:
    value = torch.randn(4, 6)
    pieces = [
        TensorPiece("w", (4, 6), (0, 0), (4, 6), start, value.view(-1)[start:end]) for start, end in [(0, 9), (10, 24)]
    ]
    with pytest.raises(SaveError, match=r"w: element \[1, 3\] of \[4, 6\] is missing"):
        save(tmp_path, 1, pieces, {}, rank=0, world=1, barrier=lambda: None)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (TensorPiece("w", (4,), (2,), (3,), 0, torch.zeros(3)), "no box inside"),
        (TensorPiece("w", (4,), (0, 0), (4, 1), 0, torch.zeros(4)), "no box inside"),
        (TensorPiece("w", (4,), (0,), (4,), 2, torch.zeros(3)), "no elements 2 to 5"),
        (TensorPiece("w", (2, 2), (0, 0), (2, 2), 0, torch.zeros(2, 2)), "must be 1-D"),
        (TensorPiece("w", (4,), (0,), (4,), 0, torch.zeros(8)[::2]), "contiguous"),
        (TensorPiece("w", (4,), (0,), (4,), 0, torch.zeros(4, dtype=torch.complex64)), "complex64 cannot be saved"),
    ],
)
def test_pieces_that_contradict_themselves(tmp_path: Path, piece: TensorPiece, message: str) -> None:
    with pytest.raises(SaveError, match=message):
        save(tmp_path, 1, [piece], {}, rank=0, world=1, barrier=lambda: None)


def test_ranks_that_disagree_about_a_tensor(tmp_path: Path) -> None:
    def action(rank: int, barrier: Callable[[], None]) -> Path:
        value = torch.zeros(2, dtype=(torch.float32, torch.bfloat16)[rank])
        pieces = [TensorPiece("w", (4,), (rank * 2,), (2,), 0, value)]
        return save(tmp_path, 1, pieces, {}, rank=rank, world=2, barrier=barrier)

    assert all("w: pieces of two tensors, F32 [4] and BF16 [4]" in str(error) for error in save_on(2, action))


def test_extra_that_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="extra holds a Tensor"):
        save(tmp_path, 1, [], {"state": torch.zeros(1)}, rank=0, world=1, barrier=lambda: None)
    assert names(tmp_path) == []
