"""What the command-line tools share: config overrides and checks of the files a config names."""
