-- For scripts whose KEYS are stream, ledger, metrics, dead letters: writes one letter, acks its entry, counts both.
local function set_aside_one(
  group, maxlen, id, deliveries, consumer, now, reason, kind, data, seq, why, form, relay, at)
  local letter = {'type', kind, 'data', data, 'seq', seq, 'origId', id, 'deliveries', tostring(deliveries),
    'reason', reason, 'error', why, 'form', form, 'consumer', consumer, 'setAsideAt', now}
  if relay ~= '' then
    letter[#letter + 1] = 'relay'
    letter[#letter + 1] = relay
  end
  if at ~= '' then
    letter[#letter + 1] = 'at'
    letter[#letter + 1] = at
  end
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', maxlen, '*', unpack(letter))
  redis.call('XACK', KEYS[1], group, id)
  redis.call('HINCRBY', KEYS[2], 'set_aside', 1)
  redis.call('HINCRBY', KEYS[2], 'drop:' .. reason, 1)
  redis.call('HINCRBY', KEYS[3], 'totalEvents', 1)
  redis.call('HINCRBY', KEYS[3], 'errors', 1)
end
