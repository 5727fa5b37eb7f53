"""Files that are broken or mean harm: does everything end right, or with one line?"""
