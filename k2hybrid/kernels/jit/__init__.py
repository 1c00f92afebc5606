"""What runs on the device. Importing a module of this folder imports Triton; `card_of` comes first."""
