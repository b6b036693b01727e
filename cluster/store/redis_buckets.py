"""The common allowances in Redis: one script does for many what router.tenants.buckets.Buckets does, by the time of Redis."""

from __future__ import annotations

from router.tenants.buckets import FORGET_S, Ask, Draw

FIELDS = 6

# ARGV: what the keys of buckets begin with; then six for each: "draw", name, want, capacity, rate, "" - or "hold", name, want, limit,
# ttl in ms, owner. A bucket is a hash of level and time (us); places are a hash from owner to "places until" (ms). Keys of another
# kind, and values that are no numbers, count as none. Numbers go back as text: Redis cuts fractions off.
# The clock of Redis may be set. Forward: buckets are full, and places are free until their owners ask again, within 2.5 s.
# Back: a bucket fills from now on, and places end no later than those that are taken now.
ASK = f"""
local now = redis.call('TIME')
local now_us = tonumber(now[1]) * 1000000 + tonumber(now[2])
local now_ms = math.floor(now_us / 1000)
local found = {{}}
for at = 2, #ARGV, {FIELDS} do
  local key, want = ARGV[1] .. ARGV[at + 1], tonumber(ARGV[at + 2])
  local kind = redis.call('TYPE', key).ok
  if kind ~= 'hash' and kind ~= 'none' then redis.call('DEL', key) end
  local amount, left
  if ARGV[at] == 'draw' then
    local capacity, rate = tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
    local kept = redis.call('HMGET', key, 'level', 'at')
    local level, since = tonumber(kept[1] or ''), tonumber(kept[2] or '')
    if not level or not since or level ~= level then level, since = capacity, now_us end
    level = math.max(0, math.min(capacity, level + rate * math.max(0, now_us - since) / 1000000))
    if want < 0 then
      amount = want
    else
      amount = math.max(0, math.min(want, level))
    end
    left = math.min(capacity, level - amount)
    redis.call('HSET', key, 'level', string.format('%.17g', left), 'at', string.format('%.0f', now_us))
    redis.call('PEXPIRE', key, {int(FORGET_S * 1000)})
  else
    local limit, ttl_ms, owner = tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4]), ARGV[at + 5]
    local taken = 0
    local fields = redis.call('HGETALL', key)
    for field = 1, #fields, 2 do
      local count, ends = string.match(fields[field + 1], '^(%d+) (%d+)$')
      if fields[field] == owner or not count or tonumber(ends) <= now_ms then
        redis.call('HDEL', key, fields[field])
      else
        taken = taken + tonumber(count)
        if tonumber(ends) > now_ms + ttl_ms then
          redis.call('HSET', key, fields[field], string.format('%s %d', count, now_ms + ttl_ms))
        end
      end
    end
    amount = math.max(0, math.min(want, limit - taken))
    left = math.max(0, limit - taken - amount)
    if amount > 0 then
      redis.call('HSET', key, owner, string.format('%d %d', amount, now_ms + ttl_ms))
      redis.call('PEXPIRE', key, ttl_ms)
    end
  end
  found[#found + 1] = string.format('%.17g', amount)
  found[#found + 1] = string.format('%.17g', left)
end
return found
"""


def arguments_of(ask: Ask) -> tuple[str, ...]:
    """Of one, for the script."""
    if isinstance(ask, Draw):
        return ("draw", ask.name, repr(float(ask.want)), repr(float(ask.capacity)), repr(float(ask.rate_per_s)), "")
    return ("hold", ask.name, str(ask.want), str(ask.limit), str(max(1, round(ask.ttl_s * 1e3))), ask.owner)
