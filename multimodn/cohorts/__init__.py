"""Data sets as modalities and tasks: real tables that come with the packages, and files that a user must have."""
