"""Boxes against counting element by element."""

import torch

from megascale_moe.checkpoint.boxes import Box, first_fault, flat_range, intersect


def test_flat_range_is_the_elements_in_order() -> None:
    for shape in [(), (5,), (3, 4), (2, 3, 4), (3, 1, 2, 2)]:
        tensor = torch.arange(Box((0,) * len(shape), shape).volume).view(shape)
        box = Box((0,) * len(shape), shape)
        for start in range(box.volume + 1):
            for end in range(start, box.volume + 1):
                boxes = flat_range(box, start, end - start)
                assert len(boxes) <= max(2 * len(shape) - 1, 1)
                parts = [tensor[part.slices(box.offset)].flatten() for part in boxes]
                assert torch.cat([torch.empty(0, dtype=torch.long), *parts]).tolist() == list(range(start, end))


def test_intersection() -> None:
    assert intersect(Box((0, 2), (4, 4)), Box((3, 0), (4, 3))) == Box((3, 2), (1, 1))
    assert intersect(Box((0, 0), (2, 2)), Box((2, 0), (2, 2))) is None
    assert intersect(Box((), ()), Box((), ())) == Box((), ())


def test_first_fault_agrees_with_counting() -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (3, 4, 2)
    faults = 0
    for _ in range(200):
        count = torch.zeros(shape, dtype=torch.long)
        boxes = flat_range(Box((0, 0, 0), shape), 0, 11) + flat_range(Box((0, 0, 0), shape), 11, 13)
        if torch.rand((), generator=generator) < 0.8:
            offset = [int(torch.randint(extent, (), generator=generator)) for extent in shape]
            boxes.append(Box(tuple(offset), tuple(extent - start for extent, start in zip(shape, offset, strict=True))))
        if torch.rand((), generator=generator) < 0.5:
            boxes.pop(int(torch.randint(len(boxes), (), generator=generator)))
        for box in boxes:
            count[box.slices((0, 0, 0))] += 1
        wrong = (count != 1).nonzero().tolist()
        faults += bool(wrong)
        expected = (tuple(wrong[0]), int(count[tuple(wrong[0])])) if wrong else None
        assert first_fault(shape, boxes) == expected
    assert 0 < faults < 200
