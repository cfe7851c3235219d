"""The parts of the report page: what it says, its charts, its picture grids, its layout."""
