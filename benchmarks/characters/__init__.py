"""Chinese characters: thousands of confusable classes, and what specialists do for them."""
