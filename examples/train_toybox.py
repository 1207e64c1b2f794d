"""Trains toybox from rendered scenes alone: codec, teacher, student.

    python examples/train_toybox.py --out runs/toybox

Every stage writes its checkpoint and its log there and goes on where it was stopped. At the end the codec and both
sets of weights lie in the folder `weights`, next to a plot of the curves. Minutes on a GPU, hours on two CPU cores.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from toybox_training.codec import new_codec, train_codec
from toybox_training.dit import TeacherForcing
from toybox_training.latents import encode_scenes, normalised, statistics
from toybox_training.stages import train_student, train_teacher

from causalrope_sp.grid import LatentGrid
from causalrope_sp.weights import save_model

SCENE_SEED, LONG_SCENE_SEED = 30_000_000, 40_000_000


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/toybox"), show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--size", default=64, show_default=True, help="Height and width of the picture in pixels.")
@click.option("--codec-steps", default=3600, show_default=True)
@click.option("--codec-stop", default=1500, show_default=True, help="The step of the schedule to stop at.")
@click.option("--teacher-steps", default=3500, show_default=True)
@click.option("--student-steps", default=1500, show_default=True)
@click.option("--videos", default=3328, show_default=True, help="Scenes of 57 frames that are encoded.")
@click.option("--long-videos", default=512, show_default=True, help="Scenes of 129 frames for the student.")
def main(
    out: Path,
    device: str,
    size: int,
    codec_steps: int,
    codec_stop: int,
    teacher_steps: int,
    student_steps: int,
    videos: int,
    long_videos: int,
) -> None:
    weights = out / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    place = torch.device(device)
    codec = train_codec(out / "codec.pt", size, codec_steps, codec_stop, 2e-3, place).eval()
    short = encode_scenes(codec, out / "scenes.pt", videos, 57, size, SCENE_SEED)
    long = encode_scenes(codec, out / "long-scenes.pt", long_videos, 129, size, LONG_SCENE_SEED)
    mean, std = statistics(short)
    shipped = new_codec(mean, std)
    shipped.load_state_dict(codec.state_dict())
    shipped.to(torch.bfloat16).save_pretrained(weights / "codec")

    forcing = TeacherForcing(LatentGrid.from_pixels(size, size), place)
    short, long = normalised(short, mean, std), normalised(long, mean, std)
    teacher = train_teacher(out / "teacher.pt", short, forcing, teacher_steps, 3e-3)
    save_model(teacher.to(torch.bfloat16), weights / "toybox-flow.safetensors")
    student = train_student(out / "student.pt", teacher.float(), short, long, forcing, student_steps, 1.2e-3)
    save_model(student.to(torch.bfloat16), weights / "toybox.safetensors")
    plot(out)


def plot(out: Path) -> None:
    """The curves of all stages, side by side, from their logs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    for axis, stage in zip(axes, ("codec", "teacher", "student"), strict=True):
        lines = [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]
        for name in sorted({name for line in lines for name in line} - {"step", "seconds", "loss"}):
            seen = [line for line in lines if name in line]
            axis.plot([line["step"] for line in seen], [line[name] for line in seen], label=name.replace("_", " "))
        axis.set(title=stage, xlabel="step")
        axis.legend(fontsize=7)
    figure.savefig(out / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
