cd CHECKOUT/build/intrinsics
while pgrep -f "x-hal4" >/dev/null; do sleep 2; done
bash lane.sh
