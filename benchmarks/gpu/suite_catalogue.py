"""Names, parts and limits of the cases, in the order in which they run: the important ones first. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from suite_process import Job

TESTS = "tests"  # the part that is pytest's


@dataclass(frozen=True)
class Case:
    """One measurement. `needs`: packages without which it is skipped; `variable`: an environment variable likewise.

    `alone`: in a process of its own, because it may leave one that others cannot use. `seconds`: its time limit.
    """

    name: str
    part: str
    seconds: float
    needs: tuple[str, ...] = ()
    variable: str | None = None
    alone: bool = False
    cuda: bool = False  # cannot run on a CPU
    slow: bool = False  # rehearsed only when it is named

    def job(self, rehearse: bool) -> Job:
        return Job(self.name, 4 * self.seconds if rehearse else self.seconds, self.alone and not rehearse)


CATALOGUE = [
    Case("card", "klein4b", 20),
    Case("encode_4b", "klein4b", 80),  # builds the model and writes the store as well
    Case("bare_4b_bf16", "klein4b", 30),
    Case("train_4b", "klein4b", 40),
    Case("bare_4b_bf16_recomputed", "klein4b", 30),
    Case("train_4b_recomputed", "klein4b", 40),
    Case("profile_4b", "klein4b", 40),
    Case("train_4b_batch4", "klein4b", 50),
    Case("bare_4b_autocast", "klein4b", 30),
    Case("bare_4b_autocast_recomputed", "klein4b", 30),
    Case("bare_9b_bf16", "klein9b", 40),
    Case("train_9b", "klein9b", 60),
    Case("train_9b_recomputed", "klein9b", 45),
    Case("train_9b_batch4", "klein9b", 60),
    Case("first_step_4b", "start", 75),
    Case("checkpoint_4b", "checkpoint", 50),
    Case("checkpoint_9b", "checkpoint", 60),
    Case("resume", "checkpoint", 100, alone=True),  # asks for deterministic kernels for the rest of its process
    Case("draw_4b", "draw", 50),
    Case("compile_4b", "compile", 120, alone=True, slow=True),  # an illegal access poisons its process
    Case("peer_4b_recomputed", "peer", 100, variable="PEER"),
    Case("peer_4b", "peer", 100, variable="PEER"),
    Case("fp8_products_4b", "memory", 50),
    Case("int8_4b", "memory", 60, needs=("torchao",)),
    Case("fp8_4b", "memory", 60, needs=("torchao",)),
    Case("nf4_4b", "memory", 60, needs=("bitsandbytes",), cuda=True),
    Case("offload_4b", "memory", 60),
    Case("full_4b_bf16_8bit", "optimizers", 60),
    Case("full_4b_bf16", "optimizers", 60),
    Case("full_4b_fp32_8bit", "optimizers", 60),
    Case("full_4b_fp32", "optimizers", 60),
    Case("ema_4b", "optimizers", 45),
    Case("prodigy_4b", "optimizers", 45),
    Case("edit_4b", "objectives", 60),
    Case("dpo_4b", "objectives", 60),
    Case("dpo_full_4b", "objectives", 75),  # with a frozen copy of all weights in CPU memory
    Case("reward_4b", "objectives", 90),
    Case("routed_4b", "objectives", 60),  # to be set beside full_4b_bf16_8bit
    Case("encode_qwen", "qwen", 60),
    Case("train_qwen", "qwen", 90),
]
PARTS = [TESTS, *dict.fromkeys(case.part for case in CATALOGUE)]


def chosen(names: list[str], done: set[str]) -> tuple[bool, list[Case]]:
    """Whether the tests are asked for, and the cases: parts and cases by name; `rest` = those that are not in `done`; none = all.

    Raises:
        ValueError: a name that is neither.
    """
    known = {*PARTS, *(case.name for case in CATALOGUE), "rest"}
    if unknown := [name for name in names if name not in known]:
        every = ", ".join(case.name for case in CATALOGUE)
        raise ValueError(f"{', '.join(unknown)}: no such part or case. Parts: {', '.join(PARTS)}, rest. Cases: {every}.")
    if not names:
        return True, CATALOGUE
    rest = "rest" in names
    cases = [case for case in CATALOGUE if {case.name, case.part} & set(names) or (rest and case.name not in done)]
    return TESTS in names or (rest and TESTS not in done), cases
