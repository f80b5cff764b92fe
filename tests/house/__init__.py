"""The project itself: its judges, its documentation, its types, its wheel and what it installs."""
