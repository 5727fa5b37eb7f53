import pytest
import torch

from sqft.ops import mask_rows

SCORES = {
    "distinct": torch.rand(9, 33, generator=torch.Generator().manual_seed(0)),
    "few values": torch.randint(0, 4, (9, 33), generator=torch.Generator().manual_seed(1)).float(),
    "all equal": torch.zeros(9, 33),
}


@pytest.mark.parametrize("kind", sorted(SCORES))
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.7, 1.0])
def test_rows_lose_their_lowest_scores(kind: str, sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a sort of each row; the counts of the first rows always add up to what was asked for."""
    monkeypatch.setattr("sqft.ops.mask.AT_ONCE", 66)  # two rows at a time
    scores = SCORES[kind]
    mask = mask_rows(scores, sparsity)
    before = 0
    for row in range(9):
        upto = round(torch.round(torch.tensor((row + 1) * sparsity * 33, dtype=torch.float64)).item())
        order = sorted(range(33), key=lambda column: float(scores[row, column]))
        assert sorted(order[: upto - before]) == torch.nonzero(~mask[row]).flatten().tolist()
        before = upto
