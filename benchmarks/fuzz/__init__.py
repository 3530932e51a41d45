"""Valid recipes and data files, damaged at random: each must be read, or refused in one line."""
