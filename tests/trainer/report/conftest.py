from evaluated import deep, glyphs, hand_worked, make_hand_worked  # noqa: F401
