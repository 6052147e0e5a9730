"""A VAE whose weights are set by hand: a random one would show nothing of what a UNet draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHANNELS, _WIDTH = 4, 16  # of the latents; four channels of a half carry one, see _set_ends
_LARGE = 32.0


def vae_by_hand() -> Any:
    """An AutoencoderKL whose latents are the means of 4 x 4 pixels, and whose pixels the nearest latent.

    The fourth channel is the mean of red, green and blue.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(_WIDTH,) * 3,
        norm_num_groups=_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=_CHANNELS,
        scaling_factor=1.5,  # brings sample pictures to about unit variance
        force_upcast=False,
    )
    colours = torch.cat([torch.eye(3), torch.full((1, 3), 1 / 3)])
    with torch.no_grad():
        for weight in vae.parameters():
            weight.zero_()  # a block whose last weights are 0 adds nothing to what it is given
        _set_ends(vae.encoder, colours)
        _set_ends(vae.decoder, torch.eye(_CHANNELS))
        for block in vae.encoder.down_blocks[:-1]:
            block.downsamplers[0].conv.weight[:, :, :2, :2] = torch.eye(_WIDTH)[:, :, None, None] / 4
        for block in vae.decoder.up_blocks[:-1]:
            block.upsamplers[0].conv.weight[:, :, 1, 1] = torch.eye(_WIDTH)
        for conv in (vae.quant_conv, vae.post_quant_conv):
            conv.weight[:, :, 0, 0] = torch.eye(len(conv.weight))
    return vae


def _set_ends(half: Any, mixed: Tensor) -> None:
    """Carry each row x of `mixed` [4, in] through a half as the group (x, -x, K, -K), and out again.

    With a large K the last norm, over that group, only divides by K / sqrt(2); and SiLU(x) - SiLU(-x) = x.
    """
    half.conv_in.weight[0::4, :, 1, 1], half.conv_in.weight[1::4, :, 1, 1] = mixed, -mixed
    half.conv_in.bias[2::4], half.conv_in.bias[3::4] = _LARGE, -_LARGE
    half.conv_norm_out.weight.fill_(_LARGE / 2**0.5)
    # The encoder's other four outputs are the latents' variances, the decoder has three colours.
    for row in range(min(_CHANNELS, len(half.conv_out.weight))):
        half.conv_out.weight[row, 4 * row : 4 * row + 2, 1, 1] = torch.tensor([1.0, -1.0])
