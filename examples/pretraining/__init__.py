"""What the reference trainings of MoCo-v3, DINO and Barlow Twins share."""
