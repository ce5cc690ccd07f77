"""All families by name, and a spread of them; those whose scans or many layers take long are not in it."""

import audio
import decoders
import encoders
import multimodal
import vision

FAMILIES = decoders.BUILDERS | encoders.BUILDERS | vision.BUILDERS | audio.BUILDERS | multimodal.BUILDERS
SPREAD = (
    "bloom", "falcon", "opt", "gpt_neox", "mistral", "qwen3", "gemma2", "olmo2", "mixtral", "gpt_oss",
    "recurrent_gemma", "albert", "deberta-v2", "modernbert", "fnet", "bart", "swin", "convnextv2", "resnet",
    "segformer", "wav2vec2", "whisper", "clip",
)  # fmt: skip
