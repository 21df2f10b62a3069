"""Clips: where they are read, how they are cut and degraded for training."""

from __future__ import annotations

from vsrplug.data.clip import Clip
from vsrplug.data.datamodule import VSRDataModule
from vsrplug.data.demo import DemoClips
from vsrplug.data.frame_folder import FrameFolder
from vsrplug.data.reds import reds
from vsrplug.data.sources import folder, vid4, video
from vsrplug.data.spmcs import spmcs
from vsrplug.data.training import TrainingClips
from vsrplug.data.udm10 import udm10
from vsrplug.data.video_file import VideoFile
from vsrplug.data.vimeo90k import vimeo90k

__all__ = [
    "Clip",
    "DemoClips",
    "FrameFolder",
    "TrainingClips",
    "VSRDataModule",
    "VideoFile",
    "folder",
    "reds",
    "spmcs",
    "udm10",
    "vid4",
    "video",
    "vimeo90k",
]
