"""Running statistics of a linear layer's calibration inputs.

Linears that read the very same tensor (q/k/v, gate/up) share one statistic. X has a row for each token.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sqft.compression.processes import sum_over_processes
from sqft.errors import CompressionError
from sqft.ops.adapted import exact_float32

__all__ = ["DenseTargetHessian", "Hessian", "InputNorm", "SingularHessianError", "factor_inverse"]

TILE = 256  # columns; tiles below the diagonal are not computed
MAX_DAMPING = 1.0
LEAF = 128  # columns of a triangle that is solved directly


class SingularHessianError(CompressionError):
    """No damping makes a Hessian one that can be factorised."""


class InputNorm:
    """L2 norm of every input feature: sqrt(sum over tokens of x²), shape (in,)."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.num_tokens = 0
        self._squares = torch.zeros(columns, dtype=torch.float32, device=device)

    def update(self, inputs: Float[Tensor, "tokens in"], dense_inputs: Tensor | None = None) -> None:
        """Take in more tokens."""
        self.num_tokens += inputs.shape[0]
        self._squares += inputs.float().square().sum(0)

    def reduce(self) -> None:
        """Take in what other processes have seen."""
        self.num_tokens = sum_over_processes(self._squares, count=self.num_tokens)

    @property
    def norm(self) -> Float[Tensor, " in"]:
        """The norms so far."""
        return self._squares.sqrt()

    @property
    def num_dead(self) -> int:
        """Inputs that were 0 in every token."""
        return int((self._squares == 0).sum())

    def check(self, name: str) -> None:
        """Raises: CompressionError if an input of linear `name` was NaN or infinite."""
        if not bool(torch.isfinite(self._squares).all()):
            raise CompressionError(
                f"{name}: calibration gave NaN or infinite inputs; check the model and the texts"
            )


class Hessian:
    """The Gram matrix of the inputs, Xᵀ X / tokens, float32 (in, in); only its upper half is accumulated."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.num_tokens = 0
        self._sum = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self._factors: dict[tuple[float, bool], tuple[Tensor, float]] = {}

    def update(self, inputs: Float[Tensor, "tokens in"], dense_inputs: Tensor | None = None) -> None:
        """Take in more tokens."""
        self.num_tokens += inputs.shape[0]
        x = inputs.float()
        with exact_float32(x.device):
            for start in range(0, x.shape[1], TILE):
                tile = slice(start, start + TILE)
                self._sum[tile, start:].addmm_(x[:, tile].T, x[:, start:])

    def reduce(self) -> None:
        """Take in what other processes have seen."""
        self.num_tokens = sum_over_processes(self._sum, count=self.num_tokens)

    @property
    def norm(self) -> Float[Tensor, " in"]:
        """The L2 norm of every input feature."""
        return self._sum.diagonal().sqrt()

    @property
    def num_dead(self) -> int:
        """Inputs that were 0 in every token."""
        return int((self._sum.diagonal() == 0).sum())

    def check(self, name: str) -> None:
        """Raises: CompressionError if an input of linear `name` was NaN or infinite."""
        if not bool(torch.isfinite(self._sum.diagonal()).all()):  # the largest entries of their rows
            raise CompressionError(
                f"{name}: calibration gave NaN or infinite inputs; check the model and the texts"
            )

    def matrix(self) -> Float[Tensor, "in in"]:
        """The whole symmetric matrix, a new tensor."""
        upper = torch.triu(self._sum).div_(max(self.num_tokens, 1))
        return upper + torch.triu(upper, 1).T

    def damped(self, damping: float) -> Float[Tensor, "in in"]:
        """The whole matrix with damping · mean(diag) added to its diagonal."""
        matrix = self.matrix()
        diagonal = matrix.diagonal()
        diagonal += damping * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
        return matrix

    def inverse_factor(self, damping: float, order: Tensor | None = None) -> tuple[Tensor, float]:
        """`factor_inverse` of the matrix, its rows and columns in `order`; computed once for each input."""
        key = (damping, order is not None)
        if key not in self._factors:
            matrix = self.matrix()
            self._factors[key] = factor_inverse(matrix if order is None else matrix[order][:, order], damping)
        return self._factors[key]


class DenseTargetHessian(Hessian):
    """The Gram matrix, and beside it Dᵀ X / tokens, D being what the uncompressed model has in place of X."""

    def __init__(self, columns: int, device: torch.device) -> None:
        super().__init__(columns, device)
        self._cross = torch.zeros(columns, columns, dtype=torch.float32, device=device)

    def update(self, inputs: Float[Tensor, "tokens in"], dense_inputs: Tensor | None = None) -> None:
        """Take in more tokens."""
        assert dense_inputs is not None
        super().update(inputs)
        with exact_float32(inputs.device):
            self._cross.addmm_(dense_inputs.float().T, inputs.float())

    def reduce(self) -> None:
        """Take in what other processes have seen."""
        self.num_tokens = sum_over_processes(self._sum, self._cross, count=self.num_tokens)

    def shift(self) -> Float[Tensor, "in in"]:
        """(D - X)ᵀ X / tokens, a new tensor."""
        return self._cross / max(self.num_tokens, 1) - self.matrix()

    def target(
        self, weight: Float[Tensor, "out in"], damping: float, *, share: float = 1.0
    ) -> Float[Tensor, "out in"]:
        """The weight whose outputs on X come nearest to those of `weight` on X + share · (D - X).

        W* = W + share · W (D - X)ᵀ X (Xᵀ X + d·I)⁻¹, with share 1 the minimum of
        ||D Wᵀ - X W*ᵀ||² + d ||W* - W||². Our own: GPTAQ (`gptaq.py`) aims at the same, column by column.
        """
        with exact_float32(weight.device):
            factor, _ = self.inverse_factor(damping)
            return weight.float() + share * ((weight.float() @ self.shift()) @ factor.T) @ factor


def factor_inverse(hessian: Float[Tensor, "in in"], damping: float) -> tuple[Float[Tensor, "in in"], float]:
    """U, upper triangular with (H + d·I)⁻¹ = Uᵀ U, and the damping that was needed.

    d = damping · mean(diag H). If H + d·I is singular in float32, damping grows tenfold until it is not, up
    to 1. One Cholesky factorisation: with the columns reversed H = R Rᵀ, R upper triangular, U = R⁻¹.

    Raises: SingularHessianError if even damping 1 does not help.
    """
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    while True:
        damped = hessian.flip(0, 1)
        damped.diagonal().add_(mean * damping)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            factor = _invert_upper(lower.flip(0, 1))
            if bool(torch.isfinite(factor).all()):
                return factor, damping
        if damping >= MAX_DAMPING:
            raise SingularHessianError(
                f"the Hessian cannot be factorised even with damping {damping:g}; check the calibration texts"
            )
        damping = min(10 * damping, MAX_DAMPING)


def _invert_upper(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The inverse of an upper triangular matrix, by halves: the zeros below the diagonal cost nothing."""
    size = matrix.shape[0]
    if size <= LEAF:
        eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve_triangular(matrix, eye, upper=True)
    half = size // 2
    inverse = torch.zeros_like(matrix)
    first = inverse[:half, :half] = _invert_upper(matrix[:half, :half])
    second = inverse[half:, half:] = _invert_upper(matrix[half:, half:])
    with exact_float32(matrix.device):
        inverse[:half, half:] = -(first @ matrix[:half, half:]) @ second
    return inverse
