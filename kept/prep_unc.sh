cd CHECKOUT/build/intrinsics/code; . ENV; cd CHECKOUT
python build/intrinsics/code/examples/prepare_uncertainty.py --data SHARED/data --output build/data/uncertainty --dtype float32 --threads 1 --limit 1280 >build/intrinsics/prep_unc.log 2>&1
