-- KEYS stream, ledger, metrics, dead letters. ARGV group, ms without a sign of who is dead, ms that another has outlived
-- it, limit of the dead letters, ms now, prefix of workers' leases.
-- Only at the head, up to the first entry that is somebody's; only where another consumer read on (else the stream waits
-- for workers to come back; before Redis 7.2 who waits for new entries gives no sign) and none of them is a fastworker
-- (it adopts); and nothing that would push out another letter. Ids whose entry somebody trimmed are acked as ghosts.
-- include set_aside_one
redis.call('XACK', KEYS[1], ARGV[1], '0-0')
local patience, idles, youngest = tonumber(ARGV[2]), {}, nil
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local consumer = {}
  for i = 1, #flat, 2 do consumer[flat[i]] = flat[i + 1] end
  if redis.call('EXISTS', ARGV[6] .. consumer['name']) == 1 then return {0, 0} end
  idles[consumer['name']] = consumer['idle']
  youngest = math.min(youngest or consumer['idle'], consumer['idle'])
end
local moved, ghosts = 0, 0
local room = tonumber(ARGV[4]) - redis.call('XLEN', KEYS[4])
for _, pending in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 100)) do
  local id, consumer, idle = pending[1], pending[2], pending[3]
  local silent = math.min(idle, idles[consumer])
  if silent < patience or idles[consumer] - youngest < tonumber(ARGV[3]) then break end
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if entry then
    local fields = {}
    for i = 1, #entry[2], 2 do fields[entry[2][i]] = entry[2][i + 1] end
    local form = fields['n'] and 'native' or fields['f'] and 'frame' or fields['data'] and 'json'
    if not form or moved >= room then break end
    local json = form == 'json'
    set_aside_one(ARGV[1], ARGV[4], id, pending[4], consumer, ARGV[5], 'abandoned',
      json and (fields['type'] or '') or form, fields['n'] or fields['f'] or fields['data'],
      json and fields['seq'] or '', 'nothing was heard of its consumer for ' .. math.floor(silent / 1000) .. ' s',
      form, form == 'frame' and fields['relay'] or '', fields['at'] or '')
    moved = moved + 1
  else
    redis.call('XACK', KEYS[1], ARGV[1], id)
    redis.call('HINCRBY', KEYS[2], 'ghosts', 1)
    ghosts = ghosts + 1
  end
end
return {moved, ghosts}
