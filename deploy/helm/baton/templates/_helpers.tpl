{{- define "baton.name" -}}
{{- .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-baton" .Release.Name) (contains "baton" .Release.Name)) | trunc 30 | trimSuffix "-" -}}
{{- end }}

{{- define "baton.tag" -}}
{{- .Values.image.tag | default .Chart.AppVersion -}}
{{- end }}

{{- define "baton.image" -}}
{{- if .Values.image.digest }}{{ .Values.image.repository }}@{{ .Values.image.digest }}{{ else }}{{ .Values.image.repository }}:{{ include "baton.tag" . }}{{ end -}}
{{- end }}

{{- define "baton.selector" -}}
app.kubernetes.io/name: baton
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "baton.labels" -}}
{{ include "baton.selector" . }}
app.kubernetes.io/version: {{ include "baton.tag" . | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "baton.secretName" -}}
{{- .Values.secrets.existingSecret | default (printf "%s-secrets" (include "baton.name" .)) -}}
{{- end }}

{{- define "baton.keysName" -}}
{{- .Values.auth.existingSecret | default (printf "%s-keys" (include "baton.name" .)) -}}
{{- end }}

{{/* The Secret with the tenants' file; empty: there are no tenants. */}}
{{- define "baton.tenantsName" -}}
{{- if .Values.tenants.existingSecret -}}{{ .Values.tenants.existingSecret }}{{- else if .Values.tenants.settings -}}{{ include "baton.name" . }}-tenants{{- end -}}
{{- end }}

{{- define "baton.authorityName" -}}
{{- if eq .Values.tls.source "existing" -}}{{ .Values.tls.existingSecret }}{{- else -}}{{ include "baton.name" . }}-authority{{- end -}}
{{- end }}

{{- define "baton.redisPasswordSecret" -}}
{{- if .Values.redis.enabled -}}{{ include "baton.secretName" . }}{{- else -}}{{ .Values.redis.external.passwordSecret }}{{- end -}}
{{- end }}

{{- define "baton.redisHost" -}}
{{- ternary (printf "%s-redis" (include "baton.name" .)) .Values.redis.external.host .Values.redis.enabled -}}
{{- end }}

{{- define "baton.redisPort" -}}
{{- ternary 6379 .Values.redis.external.port .Values.redis.enabled -}}
{{- end }}

{{/* Where workers find Ray's head: a Service with an address of its own, so that a head that is started again is found again. */}}
{{- define "baton.rayAddress" -}}
{{- ternary (printf "%s-head-svc" (include "baton.name" .)) (printf "%s-ray" (include "baton.name" .)) (eq .Values.mode "raycluster") -}}:6379
{{- end }}

{{- define "baton.modelRoot" -}}
{{- if eq .Values.model.source "image" -}}{{ .Values.model.path }}{{- else if eq .Values.model.source "download" -}}/model/checkpoint{{- else -}}{{ printf "/model/%s" .Values.model.path | trimSuffix "/" }}{{- end -}}
{{- end }}

{{/* Settings that one kind of process reads, from a file of its name: `part` is router, worker or ray (the head, ranks, and what clears the store).
So a setting of the routers starts no worker again. */}}
{{- define "baton.settingsOf" -}}
{{- $all := include "baton.settings" .top | fromYaml }}
{{- $model := dict "worker" (pick $all.worker "model") }}
{{- if eq .part "router" }}{{ toYaml (merge $model (omit $all "worker")) }}
{{- else if eq .part "worker" }}{{ toYaml (omit $all "router" "roles") }}
{{- else }}{{ toYaml (merge $model (pick $all "ray" "store" "start_timeout_s")) }}
{{- end }}
{{- end }}

{{/* Baton's own settings, of all processes. */}}
{{- define "baton.settings" -}}
{{- $store := dict "url" (printf "%s://%s:%d/%d" (ternary "rediss" "redis" (and (not .Values.redis.enabled) .Values.redis.external.tls.enabled)) (include "baton.redisHost" .) (include "baton.redisPort" . | int) (ternary 0 (int .Values.redis.external.database) .Values.redis.enabled)) "cluster" (printf "%s.%s" .Release.Namespace (include "baton.name" .)) "secret_file" "/secrets/store-secret" -}}
{{- if include "baton.redisPasswordSecret" . }}{{- $_ := set $store "password_file" "/redis/redis-password" }}{{- end }}
{{- if not .Values.redis.enabled }}
{{- with .Values.redis.external.username }}{{- $_ := set $store "username" . }}{{- end }}
{{- with .Values.redis.external.tls }}
{{- if and .enabled .secret }}{{- $_ := set $store "ca_file" "/redis-tls/ca.crt" }}{{- end }}
{{- if and .enabled .clientCertificate }}{{- $_ := set $store "cert_file" "/redis-tls/tls.crt" }}{{- $_ := set $store "key_file" "/redis-tls/tls.key" }}{{- end }}
{{- end }}
{{- end }}
{{- $worker := dict "model" (include "baton.modelRoot" .) }}
{{- with .Values.model.servedName }}{{- $_ := set $worker "served_model_name" . }}{{- end }}
{{- $router := dict "model" (include "baton.modelRoot" .) "port" 8000 "shutdown_timeout_s" (int .Values.routers.drainSeconds) }}
{{- if include "baton.tenantsName" . }}{{- $_ := set $router "tenants" (dict "file" "/tenants/tenants.yaml") }}{{- end }}
{{- $settings := dict "worker" $worker "router" (mergeOverwrite $router (deepCopy .Values.routers.router)) "store" $store "ray" (dict "token_file" "/secrets/ray-token" "address" (include "baton.rayAddress" .) "metrics_port" 8082) "tls" (dict "cert" "/tls/{name}.crt" "key" "/tls/{name}.key" "ca" "/tls/ca.crt") "start_timeout_s" 600 }}
{{- toYaml (mergeOverwrite $settings (deepCopy .Values.config)) }}
{{- end }}

{{- define "baton.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.podSecurity.user }}
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "baton.containerSecurity" -}}
runAsNonRoot: true
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* What all of Baton's pods say: who they are, where their files are. */}}
{{- define "baton.podHead" -}}
automountServiceAccountToken: false
serviceAccountName: {{ include "baton.name" . }}
enableServiceLinks: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext: {{- include "baton.podSecurity" . | nindent 2 }}
{{- end }}

{{- define "baton.placement" -}}
{{- range $field := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with index $ $field }}
{{ $field }}: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- range $field := list "priorityClassName" "runtimeClassName" }}
{{- with index $ $field }}
{{ $field }}: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "baton.env" -}}
- {name: HOME, value: /tmp}
- {name: USER, value: baton}
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}

{{/* For Ray's own commands in these pods: those of KubeRay's init container, and whoever looks with `ray status`. */}}
{{- define "baton.rayEnv" -}}
- {name: RAY_AUTH_MODE, value: token}
- {name: RAY_AUTH_TOKEN_PATH, value: /secrets/ray-token}
{{- end }}

{{/* An init container makes the pod's certificate: only it sees the authority's key. */}}
{{- define "baton.certificate" -}}
- name: certificate
  image: {{ include "baton.image" .top }}
  imagePullPolicy: {{ .top.Values.image.pullPolicy }}
  args: [tls, issue, --ca-cert=/authority/tls.crt, --ca-key=/authority/tls.key, --out=/tls, "--{{ .kind }}=$(POD_NAME)", --days={{ .top.Values.tls.days }}]
  env: {{- include "baton.env" .top | nindent 4 }}
  resources:
    requests: {cpu: 50m, memory: 64Mi}
    limits: {memory: 256Mi}
  securityContext: {{- include "baton.containerSecurity" .top | nindent 4 }}
  volumeMounts:
    - {name: authority, mountPath: /authority, readOnly: true}
    - {name: tls, mountPath: /tls}
    - {name: tmp, mountPath: /tmp}
{{- end }}

{{/* Routers need the tokenizer alone. */}}
{{- define "baton.download" -}}
{{- $router := .router }}
{{- with .top }}
{{- if eq .Values.model.source "download" }}
- name: model
  image: {{ include "baton.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [hf, download, {{ .Values.model.download.repository | quote }}, {{ printf "--revision=%s" .Values.model.download.revision | quote }}, --local-dir=/model/checkpoint{{ if $router }}, "--exclude=*.safetensors"{{ end }}]
  env: {{- include "baton.env" . | nindent 4 }}
    {{- with .Values.model.download.tokenSecret }}
    - name: HF_TOKEN
      valueFrom: {secretKeyRef: {name: {{ . }}, key: token}}
    {{- end }}
  resources:
    requests: {cpu: 100m, memory: 256Mi}
    limits: {memory: 2Gi}
  securityContext: {{- include "baton.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: model, mountPath: /model}
    - {name: tmp, mountPath: /tmp}
{{- end }}
{{- end }}
{{- end }}

{{- define "baton.modelVolume" -}}
{{- with .Values.model }}
{{- if eq .source "pvc" }}
- name: model
  persistentVolumeClaim: {claimName: {{ .pvc.claimName }}, readOnly: true}
{{- else if eq .source "hostPath" }}
- name: model
  hostPath: {path: {{ .hostPath.path }}, type: Directory}
{{- else if eq .source "imageVolume" }}
- name: model
  image: {reference: {{ .imageVolume.reference | quote }}, pullPolicy: IfNotPresent}
{{- else if and (eq .source "download") .download.cacheClaim }}
- name: model
  persistentVolumeClaim: {claimName: {{ .download.cacheClaim }}}
{{- else if eq .source "download" }}
- name: model
  emptyDir: {sizeLimit: {{ .download.sizeLimit }}}
{{- end }}
{{- end }}
{{- end }}

{{- define "baton.modelMount" -}}
{{- if ne .Values.model.source "image" }}
- {name: model, mountPath: /model, readOnly: true}
{{- end }}
{{- end }}

{{/* Settings, secrets that the process needs, and room to write. `items`: keys of the release's Secret. */}}
{{- define "baton.volumes" -}}
- name: config
  configMap: {name: {{ include "baton.name" .top }}}
- name: secrets
  secret:
    secretName: {{ include "baton.secretName" .top }}
    defaultMode: 0440
    items:
    {{- range .items }}
      - {key: {{ . }}, path: {{ . }}}
    {{- end }}
{{- with include "baton.redisPasswordSecret" .top }}
- name: redis
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items: [{key: redis-password, path: redis-password}]
{{- end }}
{{- with .top.Values.redis }}
{{- if and (not .enabled) .external.tls.enabled .external.tls.secret }}
- name: redis-tls
  secret: {secretName: {{ .external.tls.secret }}, defaultMode: 0440}
{{- end }}
{{- end }}
- name: tmp
  emptyDir: {}
{{- end }}

{{- define "baton.mounts" -}}
- {name: config, mountPath: /etc/baton, readOnly: true}
- {name: secrets, mountPath: /secrets, readOnly: true}
{{- if include "baton.redisPasswordSecret" . }}
- {name: redis, mountPath: /redis, readOnly: true}
{{- end }}
{{- with .Values.redis }}
{{- if and (not .enabled) .external.tls.enabled .external.tls.secret }}
- {name: redis-tls, mountPath: /redis-tls, readOnly: true}
{{- end }}
{{- end }}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "baton.certificateVolumes" -}}
- name: authority
  secret: {secretName: {{ include "baton.authorityName" . }}, defaultMode: 0440}
- name: tls
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
{{- end }}

{{/* Every pool with poolDefaults below it, as YAML of a map. */}}
{{- define "baton.pools" -}}
{{- $pools := dict }}
{{- range $name, $pool := .Values.pools }}
{{- if $pool }}
{{- $whole := mergeOverwrite (deepCopy $.Values.poolDefaults) (deepCopy $pool) }}
{{- if or (gt (int $whole.replicas) 0) $whole.autoscaling.enabled }}{{- $_ := set $pools $name $whole }}{{- end }}
{{- end }}
{{- end }}
{{- toYaml $pools }}
{{- end }}
