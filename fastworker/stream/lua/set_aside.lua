-- KEYS stream, ledger, metrics, dead letters, held, reads, given. ARGV group, consumer, maxlen, time, the lowest id that the
-- consumer holds then, what it was given since it told last, then nine per entry:
-- id, reason, type, data, seq, error, form, relay, at. Only what is still pending is set aside: a repeat does nothing.
-- include begin_writing
-- include set_aside_one
-- include hold
-- include disown
hold(KEYS[1], KEYS[5], KEYS[6], KEYS[7], ARGV[2], ARGV[5], ARGV[6])
local total, ended = 0, {}
for at = 7, #ARGV, 9 do
  local id = ARGV[at]
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)
  if pending[1] then
    set_aside_one(ARGV[1], ARGV[3], id, pending[1][4], ARGV[2], ARGV[4], unpack(ARGV, at + 1, at + 8))
    total = total + 1
    ended[total] = id
  end
end
if total > 0 then disown(KEYS[1], ARGV[1], KEYS[5], ARGV[2], ended) end
return total
