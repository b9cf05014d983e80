"""What a pass is, and how passes are written down, run one after the other, and verified."""
