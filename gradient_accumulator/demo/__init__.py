"""The demonstration: a 3D U-Net trained on a real brain, whole and in pieces."""
