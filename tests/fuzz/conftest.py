from fuzz.budget import load_profile

load_profile()
