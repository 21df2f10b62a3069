"""Clips: where they are read, how they are cut and degraded for training."""

from __future__ import annotations

from vsrplug.data.clip import Clip
from vsrplug.data.datamodule import VSRDataModule
from vsrplug.data.demo import DemoClips
from vsrplug.data.frame_folder import FrameFolder
from vsrplug.data.sources import folder, vid4, video
from vsrplug.data.training import TrainingClips
from vsrplug.data.video_file import VideoFile

__all__ = ["Clip", "DemoClips", "FrameFolder", "TrainingClips", "VSRDataModule", "VideoFile", "folder", "vid4", "video"]
