"""Names and geometry of patterns."""

import pytest

from sqft.patterns import CPU_DECODED, CPU_PATTERNS, Pattern


@pytest.mark.parametrize(
    "name", sorted({"1:2", "3:7", "8:32 window 4", *CPU_DECODED, *CPU_PATTERNS.values()})
)
def test_names_are_read_and_written(name: str) -> None:
    assert str(Pattern.parse(name)) == name
    assert str(Pattern.parse(f" {name.replace(' ', '   ')} ")) == name


def test_windows_stand_evenly_and_mirror_each_other() -> None:
    form = Pattern.parse("16:32 window 2")
    assert form.starts == (0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 28)
    assert set(form.widths) == {4}
    assert form.sparsity == 0.5
    assert Pattern.parse("16:32 window 3").starts == (0, 0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 24, 24)
    thirds = Pattern.parse("12:32 window 3-3-2")
    assert thirds.widths == (8,) * 8 + (4,) * 4
    assert thirds.starts == (0, 0, 2, 5, 8, 10, 13, 16, 20, 23, 26, 28)
    assert Pattern.parse("2:4").starts == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2-4", "write N:M"),
        ("5:4", "write N:M"),
        ("0:4", "write N:M"),
        ("2:4 window", "write N:M"),
        ("2:4window 1", "write N:M"),
        ("16:32 window 2 2", "write N:M"),
        ("9999999:9999999", "write N:M"),
        ("16:32 window 3-3-2", "cannot share 16 kept weights"),
        ("2:4 window 3", "at most the 4 columns"),
        ("2:4 window 0", "1 bit or more"),
    ],
)
def test_other_texts_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Pattern.parse(text)


def test_what_the_target_chooses_has_a_kernel_and_its_sparsity() -> None:
    for sparsity, name in CPU_PATTERNS.items():
        assert name in CPU_DECODED
        assert Pattern.parse(name).sparsity == sparsity
