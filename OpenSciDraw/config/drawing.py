"""In how many steps and with which guidance a run draws, what learns to draw in few, and what must agree there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from OpenSciDraw.config.objective_sections import DistillConfig

if TYPE_CHECKING:
    from OpenSciDraw.config.checks import Problem
    from OpenSciDraw.config.schema import Config

DISTILLATION = "trajectory_distillation"  # the objective that teaches a model to draw in few steps


@dataclass(frozen=True)
class Drawing:
    """`steps` of the sampler; `guidance` 1 = without, one forward a step in place of two."""

    steps: int
    guidance: float


def drawing_as_asked(config: Config) -> Drawing:
    """`num_inference_steps`; `true_cfg_scale`, else `guidance_scale`, else `validation_guidance_scale`: true guidance all."""
    given = (config.true_cfg_scale, config.guidance_scale, config.validation_guidance_scale)
    return Drawing(config.num_inference_steps, next(value for value in given if value is not None))


def drawing_of_run(config: Config) -> Drawing:
    """How the weights that a run trains draw: as asked, but what was distilled draws in `distill.steps`, without guidance."""
    return Drawing(config.distill.steps, 1.0) if config.distills else drawing_as_asked(config)


def drawing_of_teacher(config: Config) -> Drawing:
    """How the model that a distilling run starts from draws: `distill`, else as asked; `steps` a multiple of `distill.steps`."""
    asked, own = drawing_as_asked(config), config.distill
    steps, guidance = own.teacher_steps or asked.steps, asked.guidance if own.guidance is None else own.guidance
    return Drawing(own.steps * max(1, round(steps / own.steps)), guidance)


def distillation_problems(config: Config) -> list[Problem]:
    found: list[Problem] = []
    if not config.distills:
        if config.distill != DistillConfig():  # a saved config names all keys
            message = f"acts with {DISTILLATION!r} alone, and the objective is {config.train_iteration_func_name!r}. "
            message += f"Set train_iteration_func_name = {DISTILLATION!r}, or leave distill out."
            found.append((("distill", "train_iteration_func_name"), message))
        return found
    teacher = drawing_of_teacher(config)
    if teacher.steps <= config.distill.steps and teacher.guidance <= 1:
        message = f"a teacher of {teacher.steps} steps without guidance has nothing to teach a student of {config.distill.steps}. "
        message += "Set distill.teacher_steps or num_inference_steps to more steps, or distill.guidance above 1."
        found.append((("distill.teacher_steps", "num_inference_steps", "distill.steps"), message))
    if config.negative_prompt and teacher.guidance > 1:
        message = f"{config.negative_prompt!r}: the teacher is guided away from the empty prompt. Set negative_prompt = None."
        found.append((("negative_prompt", "train_iteration_func_name"), message))
    return found


def validation_model_problems(config: Config) -> list[Problem]:
    found: list[Problem] = []
    if config.validation_model is None:
        steps, guidance = config.validation_model_steps, config.validation_model_guidance
        for name, value in (("validation_model_steps", steps), ("validation_model_guidance", guidance)):
            if value is not None:
                message = f"{value!r} is for pictures on validation_model, which is None. Set that, or leave {name} out."
                found.append(((name, "validation_model"), message))
        return found
    if not config.use_lora:
        message = "another base is for an adapter, and use_lora = False trains all weights. Set validation_model = None."
        found.append((("validation_model", "use_lora"), message))
    if config.pretrained_full_ckpt_path is not None:
        message = "the adapter belongs to those weights, which stand in place of the base's. Set validation_model = None."
        found.append((("validation_model", "pretrained_full_ckpt_path"), message))
    if not config.validation_prompts:
        message = "it draws validation_prompts, and there are none. Give some, or set validation_model = None."
        found.append((("validation_model", "validation_prompts"), message))
    return found
