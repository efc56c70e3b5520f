# Helper functions of the checks, which run in the guest.
# shellcheck shell=bash disable=SC2034,SC2154,SC2317

readonly UNITS=/etc/systemd/system CONFIG=/etc/handout/handout.toml

# Restores the package as installed, with nothing running.
fresh() {
    systemctl stop 'handout*.socket' handout.service
    systemctl --quiet disable handout.socket 2>/dev/null
    rm -rf "$UNITS"/handout.service.d "$UNITS"/handout.socket.d "$UNITS"/handout-*.socket
    cp /root/handout.toml "$CONFIG"
    chmod 644 "$CONFIG"
    systemctl daemon-reload
    systemctl reset-failed
}

# Installs a drop-in for UNIT from standard input.
drop_in() {
    mkdir -p "$UNITS/$1.d"
    cat >"$UNITS/$1.d/test.conf"
    systemctl daemon-reload
}

# Installs a shipped drop-in.
shipped_drop_in() {
    mkdir -p "$UNITS/handout.service.d"
    cp "/root/systemd/$1" "$UNITS/handout.service.d/"
    systemctl daemon-reload
}

# Waits at most SECONDS until COMMAND succeeds.
within() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        if [ $SECONDS -ge $end ]; then
            echo "timed out: $*"
            return 1
        fi
        sleep 0.05
    done
}

property() { systemctl show -p "$2" --value "$1"; }
is() { [ "$(property "$1" "$2")" = "$3" ]; }
pid() { property handout.service MainPID; }
ask() { nc -d -w 5 "$@"; }
ask_udp() { echo | nc -u -W 1 -w 5 "$@"; }
get() { printf 'GET %s HTTP/1.0\r\n\r\n' "$1" | nc -N -w 5 127.0.0.1 9467; }
is_time() { grep -Eqx '[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9:]{8}\.[0-9]{6}'; }
# Prints the journal of the latest invocation of the service.
journal() { journalctl --sync && journalctl -o cat "_SYSTEMD_INVOCATION_ID=$(property handout.service InvocationID)" "$@"; }
# Sets CURSOR, after which `says` searches the journal of the units.
mark() { journalctl --sync && CURSOR=$(journalctl -n 0 --show-cursor | sed -n 's/^-- cursor: //p'); }
says() { journalctl --sync && journalctl --after-cursor "$CURSOR" -o cat -u handout.service -u handout.socket | grep -q -- "$1"; }
# Fails if COMMAND succeeds.
refused() { if "$@"; then echo "succeeded unexpectedly: $*"; return 1; fi; }

score_is_at_most() {
    local score
    score=$(systemd-analyze security --no-pager handout.service | sed -n 's/.*Overall exposure level.*: \([0-9.]*\) .*/\1/p')
    echo "exposure $score"
    [ "${score/./}" -le "$1" ]
}

# Runs COMMAND beside continuous clients and fails if any of them was refused or got a partial reply.
under_load() {
    python3 /root/load.py &
    local load=$!
    within 10 test -s /run/load
    "$@" || { kill "$load"; return 1; }
    kill -TERM "$load"
    wait "$load"
}
