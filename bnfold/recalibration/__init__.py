"""New running statistics, measured on the user's data."""
