"""What several folders need and none owns: it stands below all of them and imports none."""
