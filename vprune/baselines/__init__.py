"""Published methods to compare with, each from its paper's description: one small file, one YAML in conf/method/."""
