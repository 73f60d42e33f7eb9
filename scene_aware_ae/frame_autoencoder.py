"""The network of the stand-in encoder."""

from torch import nn


class FrameAutoencoder(nn.Module):
    """Convolutional autoencoder of small frames, each side divisible by 16; the code keeps a grid, so that it says where things are."""

    CHANNELS = 8

    def __init__(self):
        super().__init__()

        def down(a, b):
            return nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), nn.GroupNorm(4, b), nn.GELU())

        def up(a, b):
            return nn.Sequential(nn.ConvTranspose2d(a, b, 4, 2, 1), nn.GroupNorm(4, b), nn.GELU())

        self.encoder = nn.Sequential(
            down(3, 24), down(24, 48), down(48, 96), down(96, 128), nn.Conv2d(128, self.CHANNELS, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(self.CHANNELS, 128, 1),
            nn.GELU(),
            up(128, 96),
            up(96, 48),
            up(48, 24),
            nn.ConvTranspose2d(24, 3, 4, 2, 1),
        )

    def forward(self, x):
        code = self.encoder(x)
        return self.decoder(code), code
