"""The parts of the GPU benchmark in order of worth, each with its time box.

Times are worked out for one H100 (bfloat16 products at 400 TFLOP/s, memory at 3 TB/s), with 15 seconds for
each child's start: Python, torch, transformers and the CUDA context.

    facts        copies and products of a second                                                       20 s
    training     twice: 8 billion random weights 5 s, digests of 5.7 billion weights on one core 20 s,
                 then 6 steps of 0.3 to 0.8 s for each of 12 and 4 rows, 5 s a row with checkpoints     170 s
    tests        about 120 tests, most of the time Triton's compiler, in eight processes                80 s
    layers       40 s of Triton's compiler, then milliseconds a row                                     90 s
    compression  4 blocks: 4 s to write them; a block 8 to 15 s (114 TFLOP a pass in float32, Hessians
                 67 TFLOP, 40 k small launches of GPTQ); the second recipe takes what time is left     120 s
    decoding     loading 3 GB twice, 64 tokens                                                          50 s
"""

from dataclasses import dataclass

__all__ = ["PARTS", "Part"]


@dataclass(frozen=True)
class Part:
    """name: of the part and of its module `part_NAME`; seconds: its time box; least: not begun with less."""

    name: str
    about: str
    seconds: int
    least: int


PARTS = (
    Part("facts", "the card, versions, bandwidth, matrix rate, merges on GPU and CPU", 60, 10),
    Part("training", "training Llama-3-8B, random weights: step time, memory", 230, 60),
    Part("tests", "the tests marked gpu", 120, 30),
    Part("layers", "one layer at Llama-3-8B's shapes, and which kernels are fastest", 120, 30),
    Part("compression", "compressing four blocks of Llama-3-8B", 150, 40),
    Part("decoding", "decoding with the compressed blocks in transformers", 60, 20),
)
