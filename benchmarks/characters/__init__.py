"""Chinese characters: thousands of really confusable classes, and what groups and specialists do for them."""
